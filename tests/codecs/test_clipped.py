"""The search over clip ranges: never worse than min/max in squared error, and the best of its grids."""

from __future__ import annotations

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


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_the_best_of_all(symmetric: bool) -> None:
    fmt = Format(2, "per_token", 32, symmetric, "clipped")
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)).double()
    low, high = x.amin(-1), x.amax(-1)
    chosen = clipped._squared_error(x, clipped.CLIPPED.fit(x, low, high, fmt), fmt)
    every = torch.stack(
        [clipped._squared_error(x, covering(*ends, fmt), fmt) for ends in clipped._clip_ranges(low, high, fmt)]
    )
    assert len(every) == (clipped.PLACES if symmetric else clipped.PLACES**2)
    assert chosen.equal(every.amin(0))
