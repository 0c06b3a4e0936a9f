"""What the device can do at all, measured in the same run: read, copy and matrix-product rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvloom.bench._timing import Clock

_READ_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}
_MATRIX = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        read: Bytes a second of a sum over one large tensor.
        copy: Bytes a second of a large copy within the device, read and written bytes both counted.
        flops: Floating-point operations a second of a large matrix product in the compute dtype.
    """

    read: float
    copy: float
    flops: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> Ceilings:
    """Measure a device.

    Args:
        device: The device.
        dtype: Compute dtype of the matrix product.
        clock: Its clock.
    """
    nbytes = _READ_BYTES[device.type]
    return Ceilings(
        read=nbytes / _read_seconds(nbytes, device, clock),
        copy=nbytes / _copy_seconds(nbytes // 2, device, clock),
        flops=2 * _MATRIX[device.type] ** 3 / _product_seconds(_MATRIX[device.type], device, dtype, clock),
    )


def _read_seconds(nbytes: int, device: torch.device, clock: Clock) -> float:
    return clock.time([torch.randn(nbytes // 4, device=device).sum]).seconds


def _copy_seconds(nbytes: int, device: torch.device, clock: Clock) -> float:
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return clock.time([lambda: target.copy_(source)]).seconds


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return clock.time([lambda: torch.mm(a, b, out=out)]).seconds
