"""The search over clip ranges: never worse than min/max in squared error, and near the best of its grids."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvloom.codecs import _clipped as clipped
from kvloom.codecs._affine import covering
from kvloom.pages import Format
from tests.codecs.tensors import GROUPINGS, SAMPLES, decoded, relative, rows


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("grouping", "size"), GROUPINGS)
def test_no_group_has_a_larger_squared_error_than_min_max(grouping, size, bits, symmetric) -> None:
    for sample in SAMPLES.values():
        x = sample()
        fmt, plain = (Format(bits, grouping, size, symmetric, codec) for codec in ("clipped", "affine"))
        ours, theirs = (rows(decoded(x, f) - x, fmt).double().square().sum(-1) for f in (fmt, plain))
        assert bool((ours <= theirs * (1 + 1e-6)).all())


@pytest.mark.parametrize(("bits", "gain"), [(1, 0.45), (2, 0.8), (3, 0.9), (4, 0.95)])
def test_it_helps_normal_elements(bits: int, gain: float) -> None:
    x = SAMPLES["normal"]()
    fmt, plain = (Format(bits, "per_channel", 64, codec=codec) for codec in ("clipped", "affine"))
    assert relative(decoded(x, fmt), x) < gain * relative(decoded(x, plain), x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_near_the_best_of_all_pairs_of_ends(symmetric: bool, bits: int) -> None:
    fmt = Format(bits, "per_token", 64, symmetric, "clipped")
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(2)).double()
    low, high = clipped._whole_range(x.amin(-1), x.amax(-1), fmt)
    shares = torch.tensor(clipped._shares(fmt), dtype=torch.float64)
    pairs = zip(shares, shares, strict=True) if symmetric else product(shares, shares)
    grids = [covering(low + a * (high - low), high - b * (high - low), fmt) for a, b in pairs]
    least = torch.stack([clipped._squared_error(x, grid, fmt) for grid in grids]).amin(0)
    chosen = clipped._squared_error(x, clipped.CLIPPED.fit(x, x.amin(-1), x.amax(-1), fmt), fmt)
    assert chosen.sum() < 1.015 * least.sum()


def test_least_squares_find_the_grid_that_elements_lie_on() -> None:
    fmt = Format(2, "per_token", 64, False, "clipped")
    codes = torch.arange(64, dtype=torch.float64).remainder(4)
    x = 0.5 * codes + 0.25
    x[-1] = 4.0  # an outlier
    scale, zero = clipped.CLIPPED.fit(x[None], x.amin()[None], x.amax()[None], fmt)
    plain = clipped._squared_error(x[None], covering(x.amin()[None], x.amax()[None], fmt), fmt)
    assert clipped._squared_error(x[None], (scale, zero), fmt) < 0.75 * plain
