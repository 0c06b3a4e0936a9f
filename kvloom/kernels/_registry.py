"""Which backend serves a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

from kvloom.errors import KernelError
from kvloom.kernels._base import Backend
from kvloom.kernels._cpu import CpuBackend
from kvloom.kernels._cuda import CudaBackend
from kvloom.kernels._torch import TORCH
from kvloom.kernels._triton import TritonBackend

# Fastest first, by type of device; each raises KernelError where it cannot run.
_BACKENDS: dict[str, dict[str, Callable[[torch.device], Backend]]] = {
    "cpu": {"c": lambda _: CpuBackend()},
    "cuda": {"cuda": lambda device: CudaBackend(device, _portable()), "triton": lambda _: TritonBackend()},
}


def _portable() -> Backend:
    """What serves a GPU whose kernels cannot be built."""
    try:
        return TritonBackend()
    except KernelError:
        return TORCH


def backend(device: torch.device) -> Backend:
    """The fastest backend for ``device``; what keeps a faster one from being used is logged once, as a warning."""
    return _fastest(device.type, device.index)


def backends(device: torch.device) -> dict[str, Backend | str]:
    """Every backend for ``device`` by name, fastest first, or the reason why it cannot run there."""
    return dict(_known(device.type, device.index))


@cache
def _known(kind: str, index: int | None) -> dict[str, Backend | str]:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    found: dict[str, Backend | str] = {}
    for name, make in _BACKENDS.get(kind, {}).items():
        try:
            found[name] = make(device)
        except KernelError as error:
            found[name] = str(error)
    found[TORCH.name] = TORCH
    return found


@cache
def _fastest(kind: str, index: int | None) -> Backend:
    for name, found in _known(kind, index).items():
        if isinstance(found, Backend):
            return found
        logging.getLogger("kvloom").warning("kvloom's %s kernels are not used: %s.", name, found)
    raise AssertionError("the torch reference runs everywhere")
