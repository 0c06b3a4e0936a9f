"""Weighted k-means against plain loops, exhaustive search and uniform grids."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvloom.signals._kmeans import squared_error, weighted_kmeans


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heavy-tailed numbers in [-1, 1] with heavy-tailed weights."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n, generator=g, dtype=torch.float64) ** 3
    return (numbers / numbers.abs().max()).sort().values, torch.rand(n, generator=g, dtype=torch.float64) ** 4


def slow_error(numbers: torch.Tensor, weights: torch.Tensor, centres: torch.Tensor) -> float:
    return sum(
        float(w) * min((float(x) - float(c)) ** 2 for c in centres) for x, w in zip(numbers, weights, strict=True)
    )


def best(numbers: torch.Tensor, weights: torch.Tensor, clusters: int) -> float:
    """Every way to cut the sorted numbers into runs."""
    least = float("inf")
    for cuts in combinations(range(1, len(numbers)), clusters - 1):
        spans = zip((0, *cuts), (*cuts, len(numbers)), strict=True)
        error = 0.0
        for start, stop in spans:
            x, w = numbers[start:stop], weights[start:stop]
            error += float((w * (x - (w * x).sum() / w.sum()).square()).sum())
        least = min(least, error)
    return least


@given(seed=st.integers(0, 2**31), clusters=st.sampled_from([2, 4]))
@example(seed=33028, clusters=4)
def test_nothing_is_better_than_the_best_there_is(seed: int, clusters: int) -> None:
    numbers, weights = draw(12, seed)
    centres = weighted_kmeans(numbers, weights, clusters)
    assert centres.equal(centres.sort().values)
    error = slow_error(numbers, weights, centres)
    assert error == pytest.approx(squared_error(numbers, weights, centres), abs=1e-12)
    assert best(numbers, weights, clusters) <= error + 1e-12


def test_clusters_apart_are_found() -> None:
    centres = torch.tensor([-0.8, -0.1, 0.2, 0.9], dtype=torch.float64)
    numbers = (centres[:, None] + torch.linspace(-0.02, 0.02, 50, dtype=torch.float64)).flatten()
    weights = torch.ones(4, 50, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [1.0], [3.0]])
    assert weighted_kmeans(numbers, weights.flatten(), 4).tolist() == pytest.approx(centres.tolist(), abs=1e-9)


@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 3, 4]))
def test_no_uniform_grid_is_better(seed: int, bits: int) -> None:
    numbers, weights = draw(500, seed)
    error = squared_error(numbers, weights, weighted_kmeans(numbers, weights, 2**bits))
    for grid in (torch.linspace(-1, 1, 2**bits), torch.arange(1, 2 ** (bits + 1), 2) / 2**bits - 1):
        assert error < squared_error(numbers, weights, grid.double())


def test_every_centre_is_the_mean_of_its_numbers() -> None:
    numbers, weights = draw(1000, 0)
    centres = weighted_kmeans(numbers, weights, 8)
    nearest = (numbers[:, None] - centres).abs().argmin(1)
    for cluster in range(8):
        own = nearest == cluster
        mean = (weights[own] * numbers[own]).sum() / weights[own].sum()
        assert float(centres[cluster]) == pytest.approx(float(mean), abs=1e-9)


def test_fewer_numbers_than_clusters() -> None:
    numbers = torch.tensor([-0.5, 0.25], dtype=torch.float64)
    centres = weighted_kmeans(numbers, torch.ones(2, dtype=torch.float64), 8)
    assert centres.shape == (8,)
    assert centres.equal(centres.sort().values)
    assert squared_error(numbers, torch.ones(2, dtype=torch.float64), centres) == pytest.approx(0, abs=1e-12)
