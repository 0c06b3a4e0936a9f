"""The CPU backend: the reference with its product with codes in C, compiled at first use.

The one loop that plain torch cannot fuse, unpack and multiply, is `codes_product.c`. It needs a C compiler; without one
the reference does the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from kvloom._userdir import cache_dir
from kvloom.errors import KernelError
from kvloom.kernels._torch import TorchBackend
from kvloom.pages import SideLayout, row_runs

# What lets sums be vectorised. Not -ffast-math: a library linked with it turns off denormals in the whole process.
_FLAGS = ["-O3", "-shared", "-fPIC", "-funroll-loops", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
_FLAGS += ["-fassociative-math"]
# Tried in turn: not every compiler knows its own processor, or x86's vectors.
_NATIVE: tuple[list[str], ...] = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], [])
_WIDTHS = (64, 80, 96, 128, 256)
# Above this many moving rows a matrix product over unpacked codes is faster.
MAX_ROWS = 16


class CpuBackend(TorchBackend):
    """Reference with a compiled product.

    Raises:
        KernelError: There is no C compiler, or it fails.
    """

    name = "c"

    def __init__(self) -> None:
        self._plane_product = _library().kvloom_plane_product

    def codes_product(self, moving: torch.Tensor, pages: torch.Tensor, side: SideLayout) -> torch.Tensor:
        """See `kvloom.kernels._folded.Product`."""
        lead, n, groups, m, cols = moving.shape
        separable = all(plane.is_byte_separable for plane in side.planes)
        if moving.dtype != torch.float32 or m > MAX_ROWS or cols not in _WIDTHS or not separable:
            return super().codes_product(moving, pages, side)
        moving, pages = moving.contiguous(), pages.contiguous()
        rows = side.planes[0].rows
        out, scratch = moving.new_zeros((lead, n, groups, m, rows // groups)), moving.new_empty((m, cols))
        for plane in side.planes:
            runs = row_runs(plane)
            self._plane_product(
                ctypes.c_void_p(pages.data_ptr() + plane.offset),
                ctypes.c_int64(pages.stride(1)),
                ctypes.c_int64(lead * n),
                ctypes.c_void_p(runs.starts.data_ptr()),
                runs.run,
                ctypes.c_void_p(runs.order.data_ptr()),
                ctypes.c_float(1 << plane.shift),
                plane.bits,
                rows,
                cols,
                groups,
                m,
                ctypes.c_void_p(moving.data_ptr()),
                ctypes.c_void_p(scratch.data_ptr()),
                ctypes.c_void_p(out.data_ptr()),
            )
        return out


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
        raise KernelError(f"the C product cannot be built or loaded: {error}") from error


def _compilers() -> list[str]:
    return [*filter(None, [os.environ.get("CC")]), "cc", "gcc", "clang"]


def _processor() -> bytes:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(facts))]).encode()


def _compile(compiler: str, source: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / "built.so"
        for native in _NATIVE:
            done = subprocess.run(
                [compiler, *_FLAGS, *native, "-x", "c", "-", "-o", str(built)], input=source, capture_output=True
            )
            if done.returncode == 0:
                built.replace(target)  # in one step: another process may be building the same
                return
    raise KernelError(f"{compiler} fails on codes_product.c: {done.stderr.decode(errors='replace').strip()[-400:]}")
