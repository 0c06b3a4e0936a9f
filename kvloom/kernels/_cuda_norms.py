"""The residual stream and its norm on a CUDA device: launcher of ``add_norm.cu``."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvloom.kernels._cuda_sums import GROUP, PIECE, POLLS, Meeting, in_pieces, rank_defines, sums
from kvloom.kernels._nvrtc import HALVES, Defines, module

_MAX_THREADS = 1024
_MAX_PIECES = 4  # of a thread


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, meeting: Meeting | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Backend.add_norm`.

    Args:
        x: fp16 or bf16 ``[rows, channels]``, see `norms`.
        residual: Of the same shape.
        weight: ``[channels]``.
        eps: Added to the mean of squares.
        meeting: Of the ranks that ``x`` is summed over, see `sums_rows`.

    Returns:
        Residual stream and its norm, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    x, residual, weight = in_pieces(x), in_pieces(residual), in_pieces(weight)
    rows, channels = x.shape
    pieces = channels * x.itemsize // PIECE
    h, y = torch.empty_like(x), torch.empty_like(x)
    defines, threads = _build(x.dtype, pieces, 1 if meeting is None else meeting.ranks, POLLS)
    ranks = () if meeting is None else (meeting.rank, meeting.buffers, meeting.epochs)
    with torch.cuda.device(x.device):
        module("add_norm.cu", defines).launch(
            "add_norm",
            (rows, 1, 1),
            (threads, 1, 1),
            *(x, residual, weight, float(eps), h, y, pieces, *ranks),
            follows=True,
        )
    return h, y


def norms(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `add_norm` takes these."""
    return (
        x.dtype in HALVES
        and x.dtype == residual.dtype == weight.dtype
        and x.dim() == 2
        and len(x) > 0
        and x.shape == residual.shape
        and weight.shape == x.shape[1:]
        and 0 < x.shape[1] * x.itemsize <= PIECE * _MAX_THREADS * _MAX_PIECES
        and x.shape[1] * x.itemsize % PIECE == 0
    )


def sums_rows(x: torch.Tensor) -> bool:
    """Whether `add_norm`, which takes it, can sum it over ranks, too: places of a group have one epoch."""
    return sums(x) and x.shape[1] * x.itemsize % (GROUP * PIECE) == 0


@lru_cache(maxsize=32)
def _build(dtype: torch.dtype, pieces: int, ranks: int, polls: int) -> tuple[Defines, int]:
    """Defines of ``add_norm.cu``, and threads of a block."""
    of_thread = -(-pieces // _MAX_THREADS)
    threads = -(-pieces // (32 * of_thread)) * 32
    return (*rank_defines(dtype, ranks, polls), ("THREADS", threads), ("PIECES", of_thread)), threads
