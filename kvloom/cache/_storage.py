"""Bytes that are really resident."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def live_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Sum of the storages behind ``tensors``, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
