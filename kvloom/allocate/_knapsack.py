"""The multiple-choice knapsack, solved exactly or with a proven gap, with an independent lower bound.

Pick one option of every unit so that the total cost stays within a capacity and the total loss
is smallest. The solver is dynamic programming over the efficient frontier (Nemhauser and
Ullmann, *Discrete dynamic programming and capital allocation*, 1969): after each unit only the
partial picks that no other partial pick beats in both cost and loss are kept. There are never
more of them than a table over all capacities would have columns, whatever the costs' common
divisor. A Lagrangian bound discards those that provably cannot become the optimum. Problems of
thousands of units whose search would take too long end with feasible picks next to that bound.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 60

_NEVER = 2.0**62
"""A cost in bytes that fits into no capacity."""

_WORK = 3 * 10**8
"""Partial picks that the search may weigh before it gives up: some seconds."""

ROUNDING = 1e-12
"""Differences of losses, in nats a token, that sums in another order make."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one unit.

    Attributes:
        cost: [options] int64, in bytes.
        loss: [options] float64, finite; any unit, added over the units.
    """

    cost: NDArray[np.int64]
    loss: NDArray[np.float64]

    def __getitem__(self, index: NDArray[np.int64]) -> Options:
        return Options(self.cost[index], self.loss[index])


@dataclass(frozen=True, slots=True)
class Solution:
    """The best picks found and what proves them.

    Attributes:
        picks: the chosen option of each unit.
        cost: total cost of the picks, in bytes.
        loss: total loss of the picks.
        bound: the Lagrangian dual's value: no picks within the capacity can lose less.
        is_optimal: whether the search over all picks came to its end, so that `loss` is the exact minimum.
    """

    picks: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    is_optimal: bool = True

    @property
    def lower_bound(self) -> float:
        """What no picks within the capacity can fall below: `loss` if it is the minimum, else `bound`."""
        return self.loss if self.is_optimal else self.bound

    @property
    def gap(self) -> float:
        """Largest share of `loss` by which the minimum can be smaller; 0 where the difference is but rounding.

        Infinite where the loss is 0, and losses below it cannot be ruled out.
        """
        room = self.loss - self.lower_bound
        if room <= ROUNDING:
            return 0.0
        return room / abs(self.loss) if self.loss else math.inf


@dataclass(frozen=True, slots=True)
class _Dual:
    """The best multiplier found: `bound` is a lower bound, `upper` the loss of the feasible `picks`."""

    multiplier: float
    bound: float
    picks: list[int]
    upper: float
    slack: float


def cheapest(units: Sequence[Options]) -> int:
    """The smallest total cost any picks can have, in bytes."""
    return sum(int(unit.cost.min()) for unit in units)


def solve(units: Sequence[Options], capacity: int) -> Solution:
    """Finds the picks of least total loss whose total cost is at most `capacity`.

    Among picks of equal loss the cheaper ones win, and then the earlier options, so that equal
    inputs give equal picks. Where the search over all picks would weigh more than `_WORK` of them,
    the answer is the Lagrangian relaxation's own picks with what room they leave filled, best loss
    a byte first, and `is_optimal` is False.

    Args:
        units: one `Options` a unit, none of them empty.
        capacity: bytes; at least `cheapest(units)`.

    Raises:
        ValueError: nothing fits into the capacity.
    """
    if cheapest(units) > capacity:
        raise ValueError(f"capacity is {capacity}, but the cheapest picks cost {cheapest(units)}")
    kept = [efficient(unit) for unit in units]
    fronts = [unit[index] for unit, index in zip(units, kept, strict=True)]
    dual = _maximise_dual(fronts, capacity)
    chosen = _search(fronts, capacity, dual)
    is_optimal = chosen is not None
    picks = tuple(int(index[pick]) for index, pick in zip(kept, chosen or dual.picks, strict=True))
    return Solution(
        picks=picks,
        cost=sum(int(unit.cost[pick]) for unit, pick in zip(units, picks, strict=True)),
        loss=float(sum(unit.loss[pick] for unit, pick in zip(units, picks, strict=True))),
        bound=dual.bound,
        is_optimal=is_optimal,
    )


def efficient(options: Options) -> NDArray[np.int64]:
    """Indices of the options that no other beats: ascending in cost, descending in loss."""
    order = np.lexsort((options.loss, options.cost))
    loss = options.loss[order]
    improves = np.ones(len(order), dtype=bool)
    improves[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
    indices: NDArray[np.int64] = order[improves]
    return indices


def greedy(units: Sequence[Options], capacity: int) -> tuple[int, ...]:
    """The cheapest picks, then step by step the dearer option that saves most loss a byte and still fits.

    Args:
        units: as for `solve`.
        capacity: bytes; at least `cheapest(units)`.
    """
    cost, loss = _padded(units)
    start = np.lexsort((loss, cost))[:, 0]
    return tuple(_filled(cost, loss, start, capacity).tolist())


def _search(fronts: Sequence[Options], capacity: int, dual: _Dual) -> list[int] | None:
    """Grows the frontier unit by unit and walks back from its least loss; None where that is too much work."""
    price = dual.multiplier
    rest_cost = _suffix_sums([float(unit.cost.min()) for unit in fronts])
    rest_dual = _suffix_sums([float((unit.loss + price * unit.cost).min()) for unit in fronts])
    limit = dual.upper + dual.slack + price * capacity
    states = Options(np.zeros(1, np.int64), np.zeros(1))
    trail: list[tuple[NDArray[np.uint16], NDArray[np.int64]]] = []
    work = 0
    for index, unit in enumerate(fronts):
        work += len(unit.cost) * len(states.cost)
        if work > _WORK:
            return None
        grown = Options(
            np.add.outer(unit.cost, states.cost).ravel(),
            np.add.outer(unit.loss, states.loss).ravel(),
        )
        bound = grown.loss + price * grown.cost + rest_dual[index]
        alive = np.flatnonzero((grown.cost + rest_cost[index] <= capacity) & (bound <= limit))
        alive = alive[efficient(grown[alive])]
        trail.append(((alive // len(states.cost)).astype(np.uint16), alive % len(states.cost)))
        states = grown[alive]
    return _walk_back(trail, len(states.cost) - 1)


def _walk_back(trail: Sequence[tuple[NDArray[np.uint16], NDArray[np.int64]]], state: int) -> list[int]:
    picks = []
    for options, parents in reversed(trail):
        picks.append(int(options[state]))
        state = int(parents[state])
    return picks[::-1]


def _suffix_sums(values: Sequence[float]) -> list[float]:
    """For each position the sum of what follows it."""
    sums = [0.0]
    for value in values[:0:-1]:
        sums.append(sums[-1] + value)
    return sums[::-1]


def _maximise_dual(fronts: Sequence[Options], capacity: int) -> _Dual:
    """Maximises the Lagrangian dual by bisecting the sign of its slope.

    For every price p >= 0 per byte, sum_u min_o (loss + p cost) - p capacity is at most the loss of
    any picks within the capacity (weak duality). It is concave in p, and its slope is the cost of
    the minimising picks less the capacity.
    """
    cost, loss = _padded(fronts)
    low, high = 0.0, 0.0
    if _totals(cost, loss, _at_price(cost, loss, 0.0))[0] > capacity:
        high = _enough(fronts)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if _totals(cost, loss, _at_price(cost, loss, middle))[0] > capacity:
                low = middle
            else:
                high = middle
    picks = _filled(cost, loss, _at_price(cost, loss, high), capacity)
    used, upper = _totals(cost, loss, picks)
    magnitude = float(np.abs(loss[np.isfinite(loss)]).sum()) + high * (capacity + used)
    slack = 4 * (len(fronts) + 4) * sys.float_info.epsilon * magnitude
    value = max(_dual_value(cost, loss, capacity, price) for price in (low, high))
    return _Dual(multiplier=high, bound=value - slack, picks=picks.tolist(), upper=upper, slack=slack)


def _enough(fronts: Sequence[Options]) -> float:
    """A price at which every unit takes its cheapest option."""
    steepest = 0.0
    for unit in fronts:
        if len(unit.cost) > 1:
            slopes = (unit.loss[0] - unit.loss[1:]) / (unit.cost[1:] - unit.cost[0])
            steepest = max(steepest, float(slopes.max()))
    return 2 * steepest


def _padded(fronts: Sequence[Options]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Costs and losses as [units, most options]; missing options cost and lose infinitely much."""
    shape = (len(fronts), max(len(unit.cost) for unit in fronts))
    cost, loss = np.full(shape, _NEVER), np.full(shape, np.inf)
    for row, unit in enumerate(fronts):
        cost[row, : len(unit.cost)] = unit.cost
        loss[row, : len(unit.loss)] = unit.loss
    return cost, loss


def _at_price(cost: NDArray[np.float64], loss: NDArray[np.float64], price: float) -> NDArray[np.int64]:
    """The picks that minimise loss + price * cost; ties take the cheaper."""
    picks: NDArray[np.int64] = np.argmin(loss + price * cost, axis=1)
    return picks


def _totals(cost: NDArray[np.float64], loss: NDArray[np.float64], picks: NDArray[np.int64]) -> tuple[float, float]:
    rows = np.arange(len(picks))
    return float(cost[rows, picks].sum()), float(loss[rows, picks].sum())


def _filled(
    cost: NDArray[np.float64], loss: NDArray[np.float64], picks: NDArray[np.int64], capacity: int
) -> NDArray[np.int64]:
    """The picks with dearer options in the room they leave: at every step the one that saves most loss a byte."""
    rows, picks = np.arange(len(picks)), picks.copy()
    room = capacity - cost[rows, picks].sum()
    while True:
        more = cost - cost[rows, picks][:, None]
        saved = loss[rows, picks][:, None] - loss
        gain = np.where((more <= room) & (more > 0) & (saved > 0), saved / np.maximum(more, 1), 0.0)
        unit, option = np.unravel_index(gain.argmax(), gain.shape)
        if gain[unit, option] == 0:
            return picks
        room -= more[unit, option]
        picks[unit] = option


def _dual_value(cost: NDArray[np.float64], loss: NDArray[np.float64], capacity: int, price: float) -> float:
    return float((loss + price * cost).min(axis=1).sum() - price * capacity)
