"""The CPU backend: the reference with its products with packed codes in C, compiled at first use.

Unpack and multiply is the one loop that plain torch cannot fuse. `codes_product.c` does it, scales folded, for the
usual grouping (keys per channel, values per token). It needs a C compiler; without one the reference does the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import torch

from kvloom._userdir import cache_dir, write_once
from kvloom.errors import KernelError
from kvloom.kernels._torch import TorchBackend
from kvloom.pages import Codebook, Plane, SideLayout, row_runs

# What lets sums be vectorised. Not -ffast-math: a library linked with it turns off denormals in the whole process.
_FLAGS = ["-O3", "-shared", "-fPIC", "-funroll-loops", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
_FLAGS += ["-fassociative-math"]
# Tried in turn: not every compiler knows its own processor, or x86's vectors.
_NATIVE: tuple[list[str], ...] = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], [])
_WIDTHS = (64, 80, 96, 128, 256)
# Above this many moving rows a matrix product over unpacked codes is faster.
MAX_ROWS = 16


class _Plane(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("run", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("weight", ctypes.c_float),
    )


class _Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("lead", "page", "group", "row"))


class _Job(ctypes.Structure):
    """`struct job` of the C file."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("lead_bytes", "page_bytes")),
        *((name, ctypes.c_int32) for name in ("lead", "n", "groups", "m", "rows", "cols", "num_planes")),
        ("planes", _Plane * 2),
        ("points", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_strides", _Strides),
        *((name, ctypes.c_int64) for name in ("scale", "zero")),
        *((name, ctypes.c_int32) for name in ("step", "group_step")),
        ("symmetric", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("out_strides", _Strides),
    )


class CpuBackend(TorchBackend):
    """Reference with compiled products.

    Raises:
        KernelError: There is no C compiler, or it fails.
    """

    name = "c"

    def __init__(self) -> None:
        self._product = _library().kvloom_product

    def packed_scores(self, x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
        """See `kvloom.kernels._folded.packed_scores`."""
        if not _served(x, side):
            return super().packed_scores(x, pages, side, dtype)
        (lead, m, _), n, t = x.shape, pages.shape[1], side.page_tokens
        out = x.new_zeros((lead, m, n * t))
        job = _job(x, pages, side, out)
        job.x_strides = _Strides(x.stride(0), 0, 0, x.stride(1))
        job.out_strides = _Strides(m * n * t, t, t // side.groups, n * t)
        self._product(ctypes.byref(job))
        return out

    def packed_values(self, x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
        """See `kvloom.kernels._folded.packed_values`."""
        if not _served(x, side):
            return super().packed_values(x, pages, side, dtype)
        (lead, m, _), dim = x.shape, side.head_dim
        out = x.new_zeros((lead, m, dim))
        job = _job(x, pages, side, out)
        job.x_strides = _Strides(x.stride(0), side.page_tokens, 0, x.stride(1))
        job.out_strides = _Strides(m * dim, 0, dim // side.groups, dim)
        self._product(ctypes.byref(job))
        return out


def _served(x: torch.Tensor, side: SideLayout) -> bool:
    return (
        x.dtype == torch.float32
        and x.stride(-1) == 1
        and x.shape[1] <= MAX_ROWS
        and (side.role == "key") == (side.fmt.grouping == "per_channel")
        and bool(side.planes)
        and side.fmt.form != "opaque"
        and all(plane.cols in _WIDTHS and plane.is_byte_separable for plane in side.planes)
    )


def _job(x: torch.Tensor, pages: torch.Tensor, side: SideLayout, out: torch.Tensor) -> _Job:
    plane, fmt = side.planes[0], side.fmt
    per_channel = fmt.grouping == "per_channel"
    step = 1 if per_channel else fmt.num_params
    apart = 2 * side.groups * side.head_dim if per_channel else 2  # bytes from a scale to its zero point
    return _Job(
        pages=pages.data_ptr(),
        lead_bytes=pages.stride(0),
        page_bytes=pages.stride(1),
        lead=len(pages),
        n=pages.shape[1],
        groups=side.groups,
        m=x.shape[1],
        rows=plane.rows,
        cols=plane.cols,
        num_planes=len(side.planes),
        planes=_planes(side),
        points=_points(side.fmt.points),
        x=x.data_ptr(),
        scale=side.params_offset,
        zero=-1 if fmt.symmetric else side.params_offset + apart,
        step=step,
        group_step=step * plane.cols,
        symmetric=fmt.symmetric_zero,
        out=out.data_ptr(),
    )


@lru_cache(maxsize=256)
def _planes(side: SideLayout) -> ctypes.Array[_Plane]:
    planes = (_Plane * 2)()
    for i, plane in enumerate(side.planes):
        runs = row_runs(plane)  # cached for good: the addresses stay
        order = _order(side, plane) if i and side.fmt.points else runs.order
        places = (plane.offset, runs.starts.data_ptr(), order.data_ptr())
        planes[i] = _Plane(*places, runs.run, plane.bits, 1 << plane.shift)
    return planes


@cache
def _order(side: SideLayout, plane: Plane) -> torch.Tensor:
    """int32 ``[cols]``: where the first plane stores the column of each stored one of another plane."""
    return row_runs(side.planes[0]).order.flatten().argsort().int()[row_runs(plane).order.flatten()].contiguous()


@cache
def _points_held(points: Codebook) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(points))(*points)


def _points(points: Codebook) -> int | None:
    """Address of the points as floats; None where there are none."""
    return ctypes.addressof(_points_held(points)) if points else None


@cache
def _library() -> ctypes.CDLL:
    """The compiled C file, built once for each source, compiler and kind of processor."""
    source = files("kvloom.kernels").joinpath("codes_product.c").read_bytes()
    compiler = next((path for name in _compilers() if (path := shutil.which(name))), None)
    if compiler is None:
        raise KernelError("there is no C compiler (cc, gcc or clang)")
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), *map(str.encode, _FLAGS), _processor()]))
    target = cache_dir() / "kernels" / f"codes_product-{key.hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise KernelError(f"the C products cannot be built or loaded: {error}") from error


def _compilers() -> list[str]:
    return [*filter(None, [os.environ.get("CC")]), "cc", "gcc", "clang"]


def _processor() -> bytes:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(facts))]).encode()


def _compile(compiler: str, source: bytes, target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "built.so"
        for native in _NATIVE:
            command = [compiler, *_FLAGS, *native, "-x", "c", "-", "-o", str(built)]
            done = subprocess.run(command, input=source, capture_output=True)
            if done.returncode == 0:
                write_once(target, built.read_bytes())
                return
    raise KernelError(f"{compiler} fails on codes_product.c: {done.stderr.decode(errors='replace').strip()[-400:]}")
