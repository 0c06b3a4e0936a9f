"""Published quantisers as their papers and repositories define them: plain, slow, in float64, nothing rounded to fp16.

Independent of kvloom: these are what its codecs are measured against where the authors' own code is a CUDA kernel. All
take and give float64. What a formula leaves out of the authors' code is said with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]
"""Groups ``[groups, group_size]`` to what they decode to."""


def in_groups(x: Tensor, grouping: Literal["per_token", "per_channel"], size: int, quantise: Rows) -> Tensor:
    """``x [heads, tokens, head_dim]`` quantised in groups of channels of a token, or of tokens of a channel.

    Tokens that fill no group stay as they are.
    """
    if grouping == "per_token":
        return quantise(x.reshape(-1, size)).reshape(x.shape)
    whole = x.shape[-2] // size * size
    turned = x[..., :whole, :].transpose(-1, -2)
    done = quantise(turned.reshape(-1, size)).reshape(turned.shape).transpose(-1, -2)
    return torch.cat([done, x[..., whole:, :]], dim=-2)


def min_max(rows: Tensor, bits: int) -> Tensor:
    """KIVI (arXiv 2402.02750, eq. 1), KVmix (arXiv 2506.08018, section 3.3): a grid from the least to the largest.

    Left out: both store step and minimum in fp16 and choose codes before they are rounded.
    """
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = torch.where(step > 0, (rows - low) / step, 0.0).round()
    return codes * step + low


def eleven(rows: Tensor) -> Tensor:
    """KVmix's 3 bits (eq. 12): eleven codes in 32 bits, so that the last of them has two, on the step of seven levels.

    Left out: as in `min_max`.
    """
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step = (high - low) / 7
    codes = torch.where(step > 0, (rows - low) / step, 0.0).round()
    codes[:, 10].clamp_(max=3)
    return codes * step + low


def kvtuner_asymmetric(rows: Tensor, bits: int) -> Tensor:
    """KVTuner's vanilla quantiser (`vanilla_quantizer.py`), ``asym`` true: the zero point is a whole number of steps.

    Left out: steps and zero points are in the model's dtype there.
    """
    least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-5) / (2**bits - 1)
    zero = (low / step).round() - least
    return ((rows / step - zero).round().clamp(least, largest) + zero) * step


def kvtuner_symmetric(rows: Tensor, bits: int) -> Tensor:
    """The same, ``asym`` false: a level at zero, and the lowest code is never met (2 bits: three levels)."""
    least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-5) / largest
    return (rows / step).round().clamp(least, largest) * step


def awq_clipped(rows: Tensor, bits: int) -> Tensor:
    """AWQ's search (`auto_clip` of mit-han-lab/llm-awq, arXiv 2306.00978): of ten clip ranges that of the least error.

    Both ends are cut at one magnitude, down to 0.55 of the largest; the grid is `min_max`'s. Left out: there the error
    is that of a layer's output and zero points are whole numbers of steps that make the range hold zero.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    best, least = rows, torch.full_like(largest, math.inf)
    for shrunk in range(10):
        end = largest * (1 - shrunk / 20)
        decoded = min_max(rows.clamp(-end, end), bits)
        error = (decoded - rows).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, decoded, best), torch.minimum(error, least)
    return best


def quarot(x: Tensor, bits: int, clip: float) -> Tensor:
    """QuaRot's cache (arXiv 2404.00456, sections 3 and 5): heads turned by a Hadamard matrix, `min_max` of a token.

    Args:
        x: ``[heads, tokens, head_dim]``, head_dim a power of two.
        bits: Width of the codes.
        clip: Share of the range that is kept at either end; theirs is 0.95.
    """
    turn = hadamard(x.shape[-1])
    y = x @ turn
    low, high = clip * y.amin(-1, keepdim=True), clip * y.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((y - low) / step).round().clamp(0, 2**bits - 1) * step + low) @ turn.T


def hadamard(size: int) -> Tensor:
    """Sylvester's orthogonal matrix, ``[size, size]``."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def turboquant_mse(x: Tensor, bits: int) -> Tensor:
    """TurboQuant-MSE (arXiv 2504.19874, algorithm 1): the norm apart, a random rotation, one grid for all coordinates.

    Left out: the norm is in fp16 there.
    """
    dim = x.shape[-1]
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    norm = x.norm(dim=-1, keepdim=True)
    points = sphere_points(dim, bits)
    y = (x / norm.clamp(min=1e-300)) @ turn
    return points[torch.bucketize(y, (points[1:] + points[:-1]) / 2)] @ turn.T * norm


def sphere_points(dim: int, bits: int) -> Tensor:
    """Lloyd-Max points of a coordinate of a random unit vector, whose density is ``(1 - x^2)^((dim - 3) / 2)``."""
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    return weighted_lloyd(x, (1 - x * x).pow((dim - 3) / 2), 2**bits)


def weighted_lloyd(numbers: Tensor, weights: Tensor, count: int) -> Tensor:
    """Lloyd's iteration from weighted quantiles: ``count`` rising points of a small weighted squared error."""
    order = numbers.argsort()
    numbers, weights = numbers[order], weights[order]
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    points = numbers[torch.searchsorted(weights.cumsum(0), shares * weights.sum())]
    for _ in range(60):
        own = torch.bucketize(numbers, (points[1:] + points[:-1]) / 2)
        mass = torch.bincount(own, weights, count)
        points = torch.where(mass > 0, torch.bincount(own, weights * numbers, count) / mass, points)
    return points


def kvquant_points(vectors: Tensor, gradients: Tensor, bits: int, sparse: float) -> Tensor:
    """KVQuant's grid of a layer (arXiv 2401.18079, section 3.3): k-means weighted with squared gradients.

    Args:
        vectors: Calibration data ``[vectors, elements]``: channels of keys before RoPE, or tokens of values.
        gradients: Of the loss by them.
        bits: Width of the codes.
        sparse: Share of each vector that is stored apart, and not counted.

    Left out: scikit-learn's k-means starts from random points there.
    """
    low, high = kvquant_range(vectors, sparse)
    kept = (vectors >= low) & (vectors <= high)
    unit = (vectors - (high + low) / 2) / ((high - low) / 2)
    return weighted_lloyd(unit[kept], gradients[kept].square(), 2**bits)


def kvquant_range(vectors: Tensor, sparse: float) -> tuple[Tensor, Tensor]:
    """The range of each vector, ``[vectors, 1]``, that leaves out half of ``sparse`` at either end."""
    count = math.floor(sparse / 2 * vectors.shape[-1]) + 1 if sparse else 0
    ordered = vectors.sort(-1).values
    return ordered[:, [count]], ordered[:, [-1 - count]]


def kvquant(vectors: Tensor, low: Tensor, high: Tensor, points: Tensor, sparse: float) -> Tensor:
    """Vectors on the scaled grid, with those elements exact that lie outside the range, if any are stored apart."""
    middle, half = (high + low) / 2, (high - low) / 2
    unit = ((vectors - middle) / half).contiguous()
    decoded = points[torch.bucketize(unit, (points[1:] + points[:-1]) / 2)] * half + middle
    return torch.where((vectors < low) | (vectors > high), vectors, decoded) if sparse else decoded
