"""Packing and reading pages has dtypes of its own, which autocast would change under it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast of a device within it."""
    kind = device.type
    # Compiled steps ask, too: whether a kind of device has autocast at all is nothing that torch 2.11 can trace.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
