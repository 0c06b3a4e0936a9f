"""Which backends are measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom import kernels
from kvloom._names import unknown
from kvloom.errors import KernelError
from kvloom.kernels import Backend


def bench_backends(device: torch.device, names: Sequence[str] | None = None) -> dict[str, Backend | str]:
    """Backends by name, or the sentence that says why one is not available.

    Args:
        device: Where they run.
        names: Which; all by default.

    Raises:
        KernelError: A name is unknown, or one asked for is not available, or none is.
    """
    known = kernels.backends(device)
    for name in names or ():
        if name not in known:
            raise KernelError(unknown(f"on {device} --backends", name, known))
        if isinstance(lack := known[name], str):
            raise KernelError(f"--backends {name}: {lack}")
    chosen = {name: known[name] for name in names or known}
    if all(isinstance(found, str) for found in chosen.values()):
        raise KernelError(f"no backend works on {device}: {'; '.join(map(str, chosen.values()))}")
    return chosen
