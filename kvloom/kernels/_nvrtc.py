"""CUDA C++ compiled at first use by NVRTC, through cuda-core; cubins are kept on disk.

No toolkit is needed: the compiler comes with the `[gpu]` extra. A cubin is found again by its source, defines, device
architecture and compiler version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from kvloom._extras import pip_command
from kvloom._userdir import cache_dir, write_once
from kvloom.errors import KernelError

Defines = tuple[tuple[str, int | str], ...]
Build = tuple[str, Defines]
"""A source of this package's ``cuda`` folder and its macros."""
CLUSTERS_SINCE = FOLLOWING_SINCE = (9, 0)
"""Compute capabilities of clusters, and of launches that begin while the one before is ending."""
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
"""What dtypes are called in kernels."""
HALVES = (torch.float16, torch.bfloat16)
"""Dtypes of kernels that read nothing wider."""
ALIGNMENT = 16
"""Bytes that a thread reads at once."""
_STATIC_SHARED_BYTES = 48 * 1024


class Module:
    """Kernels of one compiled source on one device.

    Args:
        cubin: Device code.
        device: Index of the CUDA device.
    """

    def __init__(self, cubin: bytes, device: int) -> None:
        self._code = _core().ObjectCode.from_cubin(cubin)
        self._device = device
        self._kernels: dict[tuple[str, int], Any] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *args: Any,
        shared: int = 0,
        cluster: int = 0,
        follows: bool = False,
    ) -> None:
        """Launch on torch's current stream.

        Args:
            name: Kernel, declared ``extern "C"``.
            grid: Blocks.
            block: Threads of a block.
            *args: Tensors (their address), None (a null pointer), ints (int32), floats (float32), or ctypes scalars.
            shared: Dynamic shared memory, bytes.
            cluster: Neighbours along the grid's first axis that form a cluster, dividing it; 0 for none.
            follows: Whether it may begin while earlier launches are running: it calls ``follow`` (``follow.cuh``).
        """
        core = _core()
        kernel = self._kernels.get((name, shared)) or self._prepared(name, shared)
        stream = core.Stream.from_handle(torch.cuda.current_stream(self._device).cuda_stream)
        options: dict[str, Any] = {"grid": grid, "block": block, "shmem_size": shared}
        if cluster:  # cuda-core counts the grid in clusters
            options |= {"grid": (grid[0] // cluster, *grid[1:]), "cluster": (cluster, 1, 1)}
        if follows and torch.cuda.get_device_capability(self._device) >= FOLLOWING_SINCE:
            options["programmatic_stream_serialization"] = True
        config = core.LaunchConfig(**options)
        core.launch(stream, config, kernel, *map(_argument, args))

    def active_clusters(self, name: str, cluster: int, threads: int, shared: int) -> int:
        """Clusters of so many blocks of so many threads that the device runs at the same time."""
        from cuda.bindings import driver

        kernel = self._kernels.get((name, shared)) or self._prepared(name, shared)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        dimension = driver.CUlaunchAttribute()
        dimension.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension.value.clusterDim.x, dimension.value.clusterDim.y, dimension.value.clusterDim.z = cluster, 1, 1
        config.attrs, config.numAttrs = [dimension], 1
        error, count = driver.cuOccupancyMaxActiveClusters(driver.CUfunction(int(kernel.handle)), config)
        return int(count) if error == driver.CUresult.CUDA_SUCCESS else 0

    def _prepared(self, name: str, shared: int) -> Any:
        core = _core()
        core.Device(self._device).set_current()
        kernel = self._code.get_kernel(name)
        if shared > _STATIC_SHARED_BYTES:
            self._set(kernel, "MAX_DYNAMIC_SHARED_SIZE_BYTES", shared)
        if torch.cuda.get_device_capability(self._device) >= CLUSTERS_SINCE:
            self._set(kernel, "NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1)
        self._kernels[name, shared] = kernel
        return kernel

    def _set(self, kernel: Any, attribute: str, value: int) -> None:
        from cuda.bindings import driver

        kind = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{attribute}")
        handle = driver.CUkernel(int(kernel.handle))
        (error,) = driver.cuKernelSetAttribute(kind, value, handle, driver.CUdevice(self._device))
        if error != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"the device refuses {attribute} = {value}: {error.name}")


def int64(value: int) -> ctypes.c_int64:
    """A 64-bit argument of a launch."""
    return ctypes.c_int64(value)


def strides(x: torch.Tensor) -> list[ctypes.c_int64]:
    """Strides of the first three dimensions, in elements, as arguments of a launch."""
    return [int64(stride) for stride in x.stride()[:3]]


def is_aligned(x: torch.Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    steps = (step * x.itemsize for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    return x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0 and all(step % ALIGNMENT == 0 for step in steps)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return ctypes.c_float(value) if isinstance(value, float) else value


def module(source_file: str, defines: Defines) -> Module:
    """A source of this package's ``cuda`` folder, compiled for the current device with these macros.

    Raises:
        KernelError: cuda-core is not installed, the source does not compile, or its code cannot be kept on disk.
    """
    return _module(source_file, defines, torch.cuda.current_device())


@lru_cache(maxsize=1024)
def _module(source_file: str, defines: Defines, device: int) -> Module:
    major, minor = torch.cuda.get_device_capability(device)
    return Module(cubin(source_file, defines, f"sm_{major}{minor}"), device)


def build_all(builds: Iterable[Build], device: int) -> None:
    """Compile what is not kept on disk yet, as many at a time as there are processors.

    Raises:
        KernelError: See `module`.
    """
    major, minor = torch.cuda.get_device_capability(device)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda build: cubin(build[0], build[1], f"sm_{major}{minor}"), builds))


def cubin(source_file: str, defines: Defines, arch: str) -> bytes:
    """Device code for an architecture such as ``sm_90``; compiling needs no device.

    Raises:
        KernelError: See `module`; or there is nowhere to keep it.
    """
    source = _source(source_file)
    facts = repr((source, defines, arch, compiler_version())).encode()
    target = cache_dir() / "kernels" / f"{Path(source_file).stem}-{arch}-{hashlib.sha256(facts).hexdigest()[:16]}.cubin"
    try:
        if not target.exists():
            write_once(target, _compile(source, defines, arch))
        return target.read_bytes()
    except OSError as error:
        raise KernelError(
            f"kernels cannot be kept, set KVLOOM_CACHE to a folder that can be written: {error}"
        ) from error


def _source(name: str) -> str:
    """A source of this package, its own headers pasted in."""
    text = files("kvloom.kernels").joinpath("cuda", name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda line: _source(line[1]), text, flags=re.MULTILINE)


def _compile(source: str, defines: Defines, arch: str) -> bytes:
    core = _core()
    options: dict[str, Any] = {"std": "c++17", "arch": arch, "define_macro": [(k, str(v)) for k, v in defines]}
    try:
        program = core.Program(source, code_type="c++", options=core.ProgramOptions(**options, **_headers()))
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda-core has no public base class for NVRTC's errors
        raise KernelError(f"NVRTC cannot compile for {arch}: {str(error)[:600]}") from error


def _headers() -> dict[str, Any]:
    """Where cuda_fp16.h is: an installed toolkit or runtime wheel, else the compiler's own copy."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    return {"include_path": folder} if folder else {"use_bundled_headers": True}


@lru_cache(maxsize=64)
def shared_limit(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    return int(_core().Device(device).properties.max_shared_memory_per_block_optin)


@cache
def compiler_version() -> str:
    """NVRTC's version.

    Raises:
        KernelError: cuda-core is not installed.
    """
    _core()
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


@cache
def _core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        raise KernelError(f"cuda-core is not installed: {pip_command('gpu')}") from error
    if not hasattr(getattr(cuda.core, "LaunchConfig", None), "programmatic_stream_serialization"):
        raise KernelError(f"cuda-core is too old: {pip_command('gpu')}")
    return cuda.core
