"""How Norm-Aware KVQuant spends a budget of bits, or of groups, by the norms of the projections.

Both rules see one list of norms, ``[K0, V0, K1, V1, ...]``, and know keys from values by nothing else
(mohsenhariri/spectral-kv, `bit_pattern.py` and `group_pattern.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_TOLERANCE = 1e-6


def spend_bits(norms: Sequence[float], total: float, widths: Sequence[float]) -> list[float]:
    """Widths of the tensors, bought greedily where a bit saves most error.

    The error of a tensor of norm c at b bits is ``c**2 * 4**-b``. All start at the smallest width; the tensor whose
    next width saves most error a bit gets it, as long as the total allows; ties go to the first.

    Args:
        norms: A norm for each tensor.
        total: Bits to spend, summed over tensors.
        widths: Widths on offer.
    """
    ladder = sorted(set(widths))
    steps = [0] * len(norms)
    spent = ladder[0] * len(norms)
    while spent + _TOLERANCE < total:
        best, chosen = -1.0, None
        for i, (norm, step) in enumerate(zip(norms, steps, strict=True)):
            if step + 1 == len(ladder) or spent + ladder[step + 1] - ladder[step] > total + _TOLERANCE:
                continue
            now, then = ladder[step], ladder[step + 1]
            gain = norm**2 * (4.0**-now - 4.0**-then) / (then - now)
            if gain > best:  # without a tolerance: norms may be in any unit
                best, chosen = gain, i
        if chosen is None:
            break
        spent += ladder[steps[chosen] + 1] - ladder[steps[chosen]]
        steps[chosen] += 1
    return [ladder[step] for step in steps]


def spend_groups(norms: Sequence[float], average: float, sizes: Sequence[int]) -> list[int]:
    """Group sizes of the tensors, as many groups in all as if every tensor had groups of ``average``.

    The error of a tensor of norm c in groups of g is ``c * g``. The sizes start nearest to the continuous optimum,
    proportional to ``1 / sqrt(c)`` (ties: the smaller), and move one step at a time, cheapest first, towards the number
    of groups without passing it.

    Args:
        norms: A norm for each tensor.
        average: Group size that fixes the number of groups.
        sizes: Sizes on offer.
    """
    ladder = sorted(set(sizes))
    target = len(norms) / average
    unit = sum(math.sqrt(norm) for norm in norms) / target
    steps = [min(range(len(ladder)), key=lambda s: (abs(ladder[s] - unit / math.sqrt(c)), s)) for c in norms]
    total = sum(1 / ladder[step] for step in steps)
    while abs(total - target) > _TOLERANCE:
        direction = 1 if total > target else -1
        move = _cheapest(norms, steps, ladder, total - target, direction)
        if move is None:
            break
        total += 1 / ladder[steps[move] + direction] - 1 / ladder[steps[move]]
        steps[move] += direction
    return [ladder[step] for step in steps]


def _cheapest(
    norms: Sequence[float], steps: Sequence[int], ladder: Sequence[int], excess: float, direction: int
) -> int | None:
    """Tensor whose step costs least error (or saves most) a group removed (or added) without passing the target."""
    best, chosen = math.inf, None
    for i, (norm, step) in enumerate(zip(norms, steps, strict=True)):
        if not 0 <= step + direction < len(ladder):
            continue
        now, then = ladder[step], ladder[step + direction]
        groups = abs(1 / then - 1 / now)
        if groups > abs(excess) + _TOLERANCE:
            continue
        cost = norm * (then - now) / groups
        if cost < best:
            best, chosen = cost, i
    return chosen
