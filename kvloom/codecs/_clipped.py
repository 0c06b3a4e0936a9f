"""Clip ranges by search: of many grids that cut off a group's ends, the one with the least squared error.

Each end of the range may move inwards by sevenths of what may be cut off at most, one step of the min/max grid
and at most 35 % of the range (64 grids; 8 where the format is symmetric and the ends move together). AWQ searches the
clip ranges of weights in the same way, with one share for both ends (`auto_clip` of mit-han-lab/llm-awq, arXiv
2306.00978). Errors are those of decoding, with the parameters in fp16. The whole range is among the grids and wins
ties, so no group has a larger squared error than with min/max.

A smaller squared error is not always a better answer: see ``benchmarks/LOG.md`` for which side of a cache this helps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from kvloom.codecs._affine import covering, covering_bound
from kvloom.codecs._affine_form import AffineForm, Grid, grid_start, nearest_codes
from kvloom.codecs._base import register
from kvloom.pages import Format, codec_facts

PLACES = 8
"""Places that an end of a range may take."""

_LARGEST_SHARE = 0.35


class Clipped(AffineForm):
    """Grid of the least squared error among clipped ranges."""

    name = "clipped"
    facts = codec_facts(name)

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """See `AffineForm.fit`."""
        values = values.contiguous()  # one order of summation for all
        best: Grid | None = None
        least = torch.empty(())
        for ends in _clip_ranges(low, high, fmt):
            grid = covering(*ends, fmt)
            error = _squared_error(values, grid, fmt)
            if best is None:
                best, least = grid, error
                continue
            better = error < least
            best, least = _chosen(better, grid, best), torch.where(better, error, least)
        assert best is not None
        return best

    def group_bound(self, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half a step of min/max, and as much as may be cut off; see `AffineForm.group_bound`."""
        low, high = _whole_range(low, high, fmt)
        return covering_bound(low, high, fmt) + _shares(fmt)[-1] * (high - low)


def _clip_ranges(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ends of the grids to be tried, the whole range first."""
    low, high = _whole_range(low, high, fmt)
    spread, shares = high - low, _shares(fmt)
    for below, above in zip(shares, shares, strict=True) if fmt.symmetric else product(shares, shares):
        yield low + below * spread, high - above * spread


def _whole_range(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    if not fmt.symmetric:
        return low, high
    top = torch.maximum(low.abs(), high.abs())
    return -top, top


def _shares(fmt: Format) -> list[float]:
    """Shares of the range that an end may lose."""
    largest = min(_LARGEST_SHARE, 1 / fmt.levels)
    return [largest * i / (PLACES - 1) for i in range(PLACES)]


def _squared_error(values: torch.Tensor, grid: Grid, fmt: Format) -> torch.Tensor:
    """Sum over each group, fp64."""
    decoded = nearest_codes(values, *grid, fmt).mul_(grid[0].to(values.dtype)[..., None])
    decoded += grid_start(*grid, fmt).to(values.dtype)[..., None]
    return decoded.sub_(values).square_().sum(-1, dtype=torch.float64)


def _chosen(better: torch.Tensor, grid: Grid, best: Grid) -> Grid:
    """Parameters of ``grid`` where ``better``."""
    scale = torch.where(better, grid[0], best[0])
    if grid[1] is None or best[1] is None:
        return scale, None
    return scale, torch.where(better, grid[1], best[1])


CLIPPED = register(Clipped())
