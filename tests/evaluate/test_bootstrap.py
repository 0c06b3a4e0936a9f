"""Intervals: the right statistic, the right coverage, the same draws for everybody."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom.evaluate._bootstrap import (
    RESAMPLES,
    block_counts,
    block_mean,
    block_quantile,
    block_slope,
    median_interval,
)


def test_draws_take_as_many_blocks_as_there_are_and_never_change():
    counts = block_counts(13)
    assert counts.shape == (RESAMPLES, 13)
    assert (counts.sum(dim=1) == 13).all()
    block_counts.cache_clear()
    assert torch.equal(counts, block_counts(13))


def test_mean_weighs_blocks_by_their_tokens():
    values = torch.rand(300, generator=torch.Generator().manual_seed(0)).double()
    parts = torch.split(values, [128, 128, 44])
    estimate = block_mean(torch.stack([p.mean() for p in parts]), torch.tensor([128, 128, 44]))
    assert float(estimate.value) == pytest.approx(float(values.mean()))
    for draw in (0, 1, 999):
        drawn = torch.cat([p.repeat(int(n)) for p, n in zip(parts, block_counts(3)[draw], strict=True)])
        assert float(estimate.draws[draw]) == pytest.approx(float(drawn.mean()))


def test_coverage_of_the_mean_is_near_95_percent():
    """Autocorrelated tokens: blocks cover the truth, single tokens taken as independent do not."""
    generator = torch.Generator().manual_seed(1)
    runs, blocks, size = 400, 48, 32
    noise = torch.randn(runs, blocks * size // 8, generator=generator).double()
    tokens = noise.repeat_interleave(8, dim=1).exp()  # truth: exp(1/2)
    hits = single = 0
    for row in tokens:
        interval = block_mean(row.view(blocks, size).mean(1), torch.full((blocks,), size))
        ends = interval.interval()
        hits += ends.low <= math.exp(0.5) <= ends.high
        naive = 1.96 * float(row.std()) / math.sqrt(len(row))
        single += abs(float(row.mean()) - math.exp(0.5)) <= naive
    assert 0.90 <= hits / runs <= 0.99
    assert single / runs < 0.75


def test_quantile_is_an_order_statistic_and_its_draws_resample_blocks():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    block_of = torch.arange(1000) // 100
    estimate = block_quantile(values, block_of, 0.99)
    assert float(estimate.value) == pytest.approx(float(values.sort().values[989]))
    draw = 17
    drawn = torch.cat([values[block_of == b].repeat(int(n)) for b, n in enumerate(block_counts(10)[draw])])
    assert float(estimate.draws[draw]) == pytest.approx(float(drawn.sort().values[989]))


def test_quantile_of_a_known_distribution_is_covered():
    generator = torch.Generator().manual_seed(3)
    block_of = torch.arange(6400) // 64
    hits = 0
    for _ in range(60):
        values = torch.rand(6400, generator=generator)
        ends = block_quantile(values, block_of, 0.99).interval()
        hits += ends.low <= 0.99 <= ends.high
    assert hits >= 52


def test_slope_is_least_squares():
    steps = torch.arange(400.0)
    block_of = torch.arange(400) // 40
    noise = torch.randn(400, generator=torch.Generator().manual_seed(4))
    exact = block_slope(3 + 0.25 * steps, steps, block_of)
    assert exact.interval().as_dict() == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    flat = block_slope(noise, steps, block_of).interval()
    assert flat.low < 0 < flat.high
    rising = block_slope(noise + 0.05 * steps, steps, block_of).interval()
    assert rising.low > 0.04


def test_a_paired_difference_is_much_narrower_than_the_parts():
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(50, generator=generator).double().exp()
    tokens = torch.full((50,), 128)
    ours, theirs = block_mean(common, tokens), block_mean(common * 1.1, tokens)
    ratio = (ours / theirs).interval()
    assert ratio.high - ratio.low < 1e-9
    assert ours.interval().high > theirs.interval().low


def test_median_interval_covers():
    generator = torch.Generator().manual_seed(6)
    hits = 0
    for _ in range(400):
        ends = median_interval(torch.rand(31, generator=generator).tolist())
        assert ends.low <= ends.value <= ends.high
        hits += ends.low <= 0.5 <= ends.high
    assert hits / 400 >= 0.93


def test_median_of_few():
    assert median_interval([2.0]).as_dict() == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert median_interval([4.0, 1.0]).value == 2.5
