"""The Lloyd-Max grids against the published ones, and against Lloyd's own iteration, as far as fp16 holds them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from kvloom.pages import Format

WIDTHS = [1, 2, 3, 4]

# Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I. The last digits are a little off.
MAX_1960 = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
IN_FP16 = 2**-11


def points_of(bits: int) -> tuple[float, ...]:
    return Format(bits, "per_token", 64, True, "lloyd").points


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
    """Mean squared error over all standard normal numbers."""
    points = points_of(bits)
    parts = zip(cells(points), points, strict=True)
    return 1 - sum(mass * (2 * mean * point - point**2) for (mass, mean), point in parts)


@pytest.mark.parametrize("bits", WIDTHS)
def test_points_are_the_published_ones(bits: int) -> None:
    assert list(points_of(bits)[2 ** (bits - 1) :]) == pytest.approx(MAX_1960[bits], abs=1e-4, rel=3e-4 + IN_FP16)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_distortion_is_the_published_one(bits: int) -> None:
    assert distortion(bits) == pytest.approx(DISTORTION[bits], rel=5e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_point_is_the_mean_of_its_cell(bits: int) -> None:
    points = points_of(bits)
    assert len(points) == 2**bits
    assert list(points) == sorted(points)
    assert [-point for point in reversed(points)] == list(points)
    assert [mean for _, mean in cells(points)] == pytest.approx(list(points), rel=2 * IN_FP16)


@pytest.mark.parametrize("bits", WIDTHS)
def test_lloyds_iteration_ends_there(bits: int) -> None:
    points = tuple(-2 + 4 * i / (2**bits - 1) for i in range(2**bits))
    for _ in range(2000):
        points = tuple(mean for _, mean in cells(points))
    assert points == pytest.approx(points_of(bits), rel=IN_FP16)
