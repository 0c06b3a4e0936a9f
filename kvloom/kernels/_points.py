"""A codebook as arguments of a CUDA kernel: one module serves every codebook, since calibrated ones differ by layer."""

from __future__ import annotations

import ctypes
import struct

from kvloom.kernels._nvrtc import int64
from kvloom.pages import CODEBOOK_BITS, SideLayout

_MOST = 2**CODEBOOK_BITS


def has_codebook(side: SideLayout) -> bool:
    """Whether codes of a side stand for the points of a codebook."""
    return side.fmt.form == "codebook"


def point_arguments(side: SideLayout) -> list[ctypes.c_int64]:
    """`struct Points` of the sources: low bytes, then high bytes of 16 fp16 points, zeros beyond the last."""
    points = side.fmt.points if has_codebook(side) else ()
    halves = struct.pack(f"<{_MOST}e", *points, *[0.0] * (_MOST - len(points)))
    return [int64(number) for part in (halves[::2], halves[1::2]) for number in struct.unpack("<2q", part)]
