"""Lloyd-Max grids: the 2**bits points that keep standard normal numbers with the least mean squared error.

Every point ``c_i`` of such a grid is the mean of the numbers that are nearest to it, those between ``e_i`` and
``e_{i+1}`` (Lloyd, "Least squares quantization in PCM", 1957, IEEE Trans. Inf. Theory 28, 1982; Max, "Quantizing for
minimum distortion", IRE Trans. Inf. Theory 6, 1960):

    c_i = (phi(e_i) - phi(e_{i+1})) / (Phi(e_{i+1}) - Phi(e_i)),    e_i = (c_{i-1} + c_i) / 2

with the normal density phi and its integral Phi. One grid alone satisfies this, since log phi is concave (Fleischer,
"Sufficient conditions for achieving minimum distortion in a quantizer", 1964). Lloyd's iteration replaces the points by
the means until nothing moves, which at 8 bits takes some hundred thousand steps; here Newton's method solves the same
equations. It starts from points spread as the cube root of the density, which is best for many points (Panter and Dite,
"Quantization distortion in pulse-count modulation with nonuniform spacing of levels", Proc. IRE 39, 1951): quantiles of
a normal distribution of variance 3.

A grid is symmetric about zero, so its positive half is found, between the edges 0 and infinity.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch

_NEWTON_STEPS = 6


@cache
def normal_grid(bits: int) -> tuple[float, ...]:
    """The ``2**bits`` points of the Lloyd-Max grid of standard normal numbers, rising, to 1e-12."""
    half = 2 ** (bits - 1)
    shares = torch.arange(half + 0.5, 2 * half, dtype=torch.float64, device="cpu") / (2 * half)
    points = math.sqrt(3) * torch.special.ndtri(shares)
    for _ in range(_NEWTON_STEPS):
        points = _newton_step(points)
    positive = points.tolist()
    return (*(-point for point in reversed(positive)), *positive)


@lru_cache(maxsize=64)
def grid_points(bits: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`normal_grid`, rounded to fp32: ``[2**bits]`` of ``dtype``, fp32 or fp64."""
    return torch.tensor(normal_grid(bits), dtype=torch.float32, device=device).to(dtype)


@lru_cache(maxsize=64)
def grid_edges(bits: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Where the nearest of `grid_points` changes: ``[2**bits - 1]`` of ``dtype``, fp32 or fp64."""
    points = grid_points(bits, torch.float64, device)
    return ((points[1:] + points[:-1]) / 2).to(dtype)


def _newton_step(points: torch.Tensor) -> torch.Tensor:
    """Positive points fp64 ``[half]``, closer to the means of their cells."""
    edges = _half_edges(points)
    means, by_lower, by_upper = _cell_means(edges)
    # A cell's mean moves by half of what either neighbour, or its own point, moves.
    slope = torch.diag(by_lower[1:], -1) + torch.diag(by_upper[:-1], 1)
    slope += torch.diag(by_upper + torch.where(edges[:-1] > 0, by_lower, 0.0))
    step: torch.Tensor = torch.linalg.solve(torch.eye(len(points)).to(slope) - slope / 2, points - means)
    return points - step


def _half_edges(points: torch.Tensor) -> torch.Tensor:
    """Edges of the cells of positive points, ``[half + 1]``."""
    return torch.cat([points.new_zeros(1), (points[1:] + points[:-1]) / 2, points.new_full((1,), math.inf)])


def _cell_means(edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean of a standard normal number within each cell, and its derivatives by the lower and the upper edge."""
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    above = torch.erfc(edges / math.sqrt(2)) / 2
    mass = above[:-1] - above[1:]
    means = (density[:-1] - density[1:]) / mass
    by_lower = density[:-1] * (means - edges[:-1]) / mass
    by_upper = torch.where(density[1:] > 0, density[1:] * (edges[1:] - means), 0.0) / mass
    return means, by_lower, by_upper
