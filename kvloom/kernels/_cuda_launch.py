"""How attention over pages is launched: as which kernel, in how many blocks of how many warps, merged how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvloom.kernels import _nvrtc
from kvloom.kernels._cuda_turns import hadamard_defines
from kvloom.kernels._nvrtc import Defines
from kvloom.kernels._points import has_codebook
from kvloom.pages import PageLayout, SideLayout

ROWS = 8  # query rows of one block, the N of the matrix instruction
SOURCE = "attend.cu"
_STAGES = 2  # pages of a warp in shared memory, as in attend.cu
MAX_CLUSTER = 16
BLOCK_WARPS = (12, 8, 4, 2, 1)
_EXACT_TOKENS = 16  # that a warp reads at a time


@dataclass(frozen=True)
class Turns:
    """What kernels turn where a format says so.

    Attributes:
        queries: As keys are turned.
        outputs: Back, as values are turned.
    """

    queries: bool = False
    outputs: bool = False

    def of(self, layout: PageLayout) -> Turns:
        """Those of heads of one layout."""
        keys, values = (side.fmt.rotation == "hadamard" for side in (layout.key, layout.value))
        return Turns(self.queries and keys, self.outputs and values)


NO_TURNS = Turns()


def turns_by_format(layouts: Iterable[PageLayout]) -> Turns:
    """What kernels can turn of a layer: sides of which no head is turned by a matrix of its plan."""
    rotations = [(layout.key.fmt.rotation, layout.value.fmt.rotation) for layout in layouts]
    return Turns(*("calibrated" not in side for side in zip(*rotations, strict=True)))


@dataclass(frozen=True)
class Kernel:
    """One build of ``attend.cu``, but for how its splits are merged.

    Attributes:
        layout: Of the pages.
        warps: Of a block.
        is_bf16: Compute dtype; fp16 otherwise.
        masked: See ``attend.cu``, likewise the others.
        is_capped: Whether scores are.
        place: Bytes of a place; 0 where masks are by slot.
        is_pooled: Whether exact tokens lie in blocks.
        is_roped: Whether queries have no positions yet.
        turns: What is turned.
    """

    layout: PageLayout
    warps: int
    is_bf16: bool
    masked: int = 0
    is_capped: bool = False
    place: int = 0
    is_pooled: bool = False
    is_roped: bool = False
    turns: Turns = NO_TURNS

    def defines(self, *, clustered: bool) -> Defines:
        """Its macros."""
        return _defines(self, clustered)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return shared_bytes(self.layout, self.warps)


def spread(
    layout: PageLayout, tiles: int, pages: int, exact: int, processors: int, shared_limit: int
) -> tuple[int, int]:
    """Warps of a block, and into how many blocks a row tile's tokens are split.

    Args:
        layout: Of the pages.
        tiles: Row tiles of all sequences and heads.
        pages: Of a head.
        exact: Most sinks and most tokens of the tail, each in units of `exact_units`.
        processors: Multiprocessors.
        shared_limit: Bytes of shared memory that a block may have.
    """
    warps = block_warps(layout, -(-tiles // processors), tiles * pages // processors, shared_limit)
    return warps, max(1, min(processors // tiles, -(-(pages + exact) // warps)))


def exact_units(sinks: int, tail: int) -> int:
    """What exact tokens are shared out in."""
    return -(-sinks // _EXACT_TOKENS) + -(-tail // _EXACT_TOKENS)


@lru_cache(maxsize=1024)
def merges_in_cluster(kernel: Kernel, splits: int, tiles: int, device: int) -> bool:
    """Whether the splits of a row tile can be one cluster, and all clusters run at the same time.

    A cluster lies within one group of multiprocessors, whose sizes are no multiples of every cluster's: 32 clusters of
    4 blocks need not fit on 132 multiprocessors, and the last ones would double the time of all.
    """
    if not has_clusters(device) or splits > MAX_CLUSTER:
        return False
    if splits == 1:
        return True
    module = _nvrtc.module(SOURCE, kernel.defines(clustered=True))
    return module.active_clusters("attend", splits, 32 * kernel.warps, kernel.shared) >= tiles


def has_clusters(device: int) -> bool:
    """Whether blocks of the device can be clusters."""
    return torch.cuda.get_device_capability(device) >= _nvrtc.CLUSTERS_SINCE


@lru_cache(maxsize=16)
def multiprocessors(device: int) -> int:
    """Of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1024)
def block_warps(layout: PageLayout, tiles: int, pages: int, shared_limit: int) -> int:
    """Warps of a block as they are fastest on an H100 (benchmarks/LOG.md).

    A multiprocessor that reads one row tile has one block. One that reads several has as many small blocks side by side
    as make eight warps: while one of them begins or merges, the others load.

    Args:
        layout: Of the pages.
        tiles: Row tiles that a multiprocessor reads, rounded up.
        pages: That it reads for all of them.
        shared_limit: Bytes of shared memory that a block may have.

    Returns:
        12, 8, 4, 2 or 1; or 0 where not even one warp's pages fit.
    """
    most = _lone_warps(layout, pages) if tiles <= 1 else _shared_warps(tiles, pages)
    return next((n for n in BLOCK_WARPS if n <= most and shared_bytes(layout, n) <= shared_limit), 0)


def _lone_warps(layout: PageLayout, pages: int) -> int:
    return 12 if pages >= _BULK_PAGES and _is_small(layout) else 8 if pages >= _BUSY_PAGES else 4


_BUSY_PAGES, _BULK_PAGES = 2, 160


def _shared_warps(tiles: int, pages: int) -> int:
    if tiles > _MANY_TILES and pages >= tiles * _MANY_PAGES:
        return 2
    return 4 if tiles <= 2 else 2 if tiles <= 4 else 1


_MANY_TILES, _MANY_PAGES = 16, 16


def _is_small(layout: PageLayout) -> bool:
    """Whether a warp needs so few bytes on their way, and so few registers, that twelve are better than eight."""
    looks_up = has_codebook(layout.key) or has_codebook(layout.value)
    return layout.nbytes <= _SMALL_PAGE and layout.head_dim <= _SMALL_HEAD_DIM and not looks_up


_SMALL_PAGE, _SMALL_HEAD_DIM = 8 << 10, 128


@lru_cache(maxsize=1024)
def _defines(kernel: Kernel, clustered: bool) -> Defines:
    key, value = kernel.layout.key, kernel.layout.value
    numbers = {
        "D": kernel.layout.head_dim,
        "P": kernel.layout.page_tokens,
        **dict(zip(("KB0", "KB1"), _plane_bits(key), strict=True)),
        **dict(zip(("VB0", "VB1"), _plane_bits(value), strict=True)),
        "KGROUPS": _groups(key),
        "VGROUPS": _groups(value),
        "KSYM": key.fmt.symmetric,
        "VSYM": value.fmt.symmetric,
        "KPOINTS": has_codebook(key),
        "VPOINTS": has_codebook(value),
        "KTOK": key.fmt.grouping == "per_token",
        "VCH": value.fmt.grouping == "per_channel",
        "BF16": kernel.is_bf16,
        "MASKED": kernel.masked,
        "PLACE": kernel.place,
        "POOLED": kernel.is_pooled,
        "ROPED": kernel.is_roped,
        "KTURNED": kernel.turns.queries,
        "VTURNED": kernel.turns.outputs,
        "SOFTCAP": kernel.is_capped,
        "WARPS": kernel.warps,
        "CLUSTER": clustered,
    }
    own = tuple((name, int(number)) for name, number in numbers.items())
    return own if kernel.turns == NO_TURNS else (*own, *hadamard_defines(kernel.layout.head_dim))


def _plane_bits(side: SideLayout) -> tuple[int, int]:
    if side.fmt.is_passthrough:
        return 16, 0
    low, high = (*(plane.bits for plane in side.planes), 0)[:2]
    return low, high


def _groups(side: SideLayout) -> int:
    return 1 if side.fmt.is_passthrough else side.groups


def shared_bytes(layout: PageLayout, warps: int) -> int:
    """The rings, or what merging the warps needs in their place; queries; what blocks of a cluster send each other."""
    ring = max(_STAGES * layout.nbytes, (_STAGES - 1) * layout.nbytes + 32 * layout.head_dim)
    merge = warps * ROWS * (layout.head_dim + 4 + 2) * 4
    landing = ROWS * layout.head_dim * 4 + MAX_CLUSTER * (ROWS * 8 + 16)
    return max(warps * ring, merge) + ROWS * layout.head_dim * 2 + landing
