"""Clip ranges by search: of many grids that cut off a group's ends, the one with the least squared error.

Each end of the range may move inwards by sevenths of what may be cut off at most, one step of the min/max grid and at
most 35 % of the range. The ends move in turn (low, high, low again; together where the format is symmetric): 24 grids
that miss the best of all 64 pairs by 0.5 to 4 %. Then, twice, the line of least squares through the elements over their
codes is tried, held to what may be cut off: about the best of the 64, with fewer grids. AWQ searches the clip ranges of
weights in the same way, with one share for both ends (`auto_clip` of mit-han-lab/llm-awq, arXiv 2306.00978). Errors are
those of decoding, with the parameters in fp16. The whole range is among the grids and wins ties, so no group has a
larger squared error than with min/max.

A smaller squared error is not always a better answer: see ``benchmarks/LOG.md`` for which side of a cache this helps.
"""

from __future__ import annotations

import torch

from kvloom.codecs._affine import covering, covering_bound
from kvloom.codecs._affine_form import AffineForm, Grid, grid_start, nearest_codes
from kvloom.codecs._base import register
from kvloom.pages import Format, codec_facts

PLACES = 8
"""Places that an end of a range may take."""

_LARGEST_SHARE = 0.35
_REFITS = 2

Ends = tuple[torch.Tensor, torch.Tensor]
"""Low and high end of the range of each group."""


class Clipped(AffineForm):
    """Grid of the least squared error among clipped ranges."""

    name = "clipped"
    facts = codec_facts(name)

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """See `AffineForm.fit`."""
        search = _Search(values.contiguous(), _whole_range(low, high, fmt), fmt)  # one order of summation for all
        for moved in ((True, True),) if fmt.symmetric else ((True, False), (False, True), (True, False)):
            search.move(*moved)
        for _ in range(_REFITS):
            search.refit()
        return search.grid

    def group_bound(self, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half a step of min/max, and as much as may be cut off; see `AffineForm.group_bound`."""
        low, high = _whole_range(low, high, fmt)
        return covering_bound(low, high, fmt) + _shares(fmt)[-1] * (high - low)


class _Search:
    """The best grid so far of each group.

    Args:
        values: fp32 or fp64 ``[..., group_size]``, contiguous.
        whole: Ends of the range that nothing is cut off.
        fmt: Format.
    """

    def __init__(self, values: torch.Tensor, whole: Ends, fmt: Format) -> None:
        self._values, self._fmt, self._whole = values, fmt, whole
        self._spread = whole[1] - whole[0]
        self._ends, self.grid = whole, covering(*whole, fmt)
        self._error = _squared_error(values, self.grid, fmt)

    def move(self, low: bool, high: bool) -> None:
        """Try every place of these ends, the other end where it is."""
        for share in _shares(self._fmt):
            cut = share * self._spread
            self._try(
                (
                    self._whole[0] + cut if low else self._ends[0],
                    self._whole[1] - cut if high else self._ends[1],
                )
            )

    def refit(self) -> None:
        """Try the line of least squares through the elements over their codes."""
        levels, most = self._fmt.levels, _shares(self._fmt)[-1] * self._spread
        x, codes = self._values.double(), nearest_codes(self._values, *self.grid, self._fmt).double()
        if self._fmt.symmetric:
            codes = codes - 0.5 * levels
            high = _slope(x, codes) * (0.5 * levels)
            low = -high
        else:
            mean = x.mean(-1)
            slope = _slope(x - mean[..., None], codes - codes.mean(-1, keepdim=True))
            low = mean - slope * codes.mean(-1)
            high = low + slope * levels
        low, high = (end.to(self._spread.dtype) for end in (low, high))
        self._try((low.clamp(self._whole[0], self._whole[0] + most), high.clamp(self._whole[1] - most, self._whole[1])))

    def _try(self, ends: Ends) -> None:
        grid = covering(*ends, self._fmt)
        error = _squared_error(self._values, grid, self._fmt)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.grid = _chosen(better, grid, self.grid)
        self._ends = (torch.where(better, ends[0], self._ends[0]), torch.where(better, ends[1], self._ends[1]))


def _slope(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Of least squares, both about their means, ``[..., group_size]`` to ``[...]``; zero where all codes are one."""
    squares = codes.square().sum(-1)
    return (x * codes).sum(-1) / torch.where(squares > 0, squares, torch.ones_like(squares))


def _whole_range(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Ends:
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
