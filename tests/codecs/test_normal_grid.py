"""The computed Lloyd-Max grids against the published ones, and against Lloyd's own iteration."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kvloom.codecs._normal_grid import grid_edges, grid_points, normal_grid

WIDTHS = [1, 2, 3, 4, 5, 6, 8]

# Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I. The last digits are a little off.
MAX_1960 = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def integral(x: float) -> float:
    return math.erf(x / math.sqrt(2)) / 2


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cells(points: tuple[float, ...]) -> list[tuple[float, float]]:
    """Mass and mean of the numbers nearest to each point."""
    inner = [(a + b) / 2 for a, b in pairwise(points)]
    edges = [-math.inf, *inner, math.inf]
    masses = [integral(b) - integral(a) for a, b in pairwise(edges)]
    moments = [density(a) - density(b) for a, b in pairwise(edges)]
    return [(mass, moment / mass) for mass, moment in zip(masses, moments, strict=True)]


def distortion(bits: int) -> float:
    """Mean squared error; the mean square of what is kept and of what is lost add up to 1."""
    points = normal_grid(bits)
    return 1 - sum(mass * point**2 for (mass, _), point in zip(cells(points), points, strict=True))


@pytest.mark.parametrize("bits", MAX_1960)
def test_points_are_the_published_ones(bits: int) -> None:
    points = normal_grid(bits)
    assert list(points[2 ** (bits - 1) :]) == pytest.approx(MAX_1960[bits], abs=1e-4, rel=3e-4)


@pytest.mark.parametrize("bits", DISTORTION)
def test_the_distortion_is_the_published_one(bits: int) -> None:
    assert distortion(bits) == pytest.approx(DISTORTION[bits], rel=5e-4)


@pytest.mark.parametrize(("bits", "share"), [(5, 0.94), (6, 0.96), (8, 0.99)])
def test_many_points_approach_the_panter_dite_limit(bits: int, share: float) -> None:
    """Distortion tends to ``sqrt(3) pi / 2 / 4**bits`` from below."""
    limit = math.sqrt(3) * math.pi / 2 / 4**bits
    assert share * limit < distortion(bits) < limit


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_point_is_the_mean_of_its_cell(bits: int) -> None:
    points = normal_grid(bits)
    assert len(points) == 2**bits
    assert list(points) == sorted(points)
    assert [-point for point in reversed(points)] == list(points)
    assert [mean for _, mean in cells(points)] == pytest.approx(list(points), abs=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_lloyds_iteration_ends_there(bits: int) -> None:
    points = tuple(-2 + 4 * i / (2**bits - 1) for i in range(2**bits))
    for _ in range(300):
        points = tuple(mean for _, mean in cells(points))
    assert points == pytest.approx(normal_grid(bits), abs=1e-9)


def test_tensors_hold_what_decoding_uses() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        points, edges = (make(3, dtype, cpu) for make in (grid_points, grid_edges))
        assert points.dtype == edges.dtype == dtype
        assert points.equal(points.float().to(dtype))
        assert edges.equal(-edges.flip(0))
        assert torch.bucketize(points, edges).tolist() == list(range(8))
