"""The knapsack under side constraints, as a mixed-integer linear program.

A binary variable for each choice of each unit says whether it is picked. Equal bits, allowed pairs and the number of
page layouts are linear in these, and `scipy.optimize.milp` (HiGHS: Huangfu and Hall, *Parallelizing the dual revised
simplex method*, 2018) solves the program by branch and cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvloom._extras import require
from kvloom.allocate._constraints import Constraints
from kvloom.allocate._knapsack import Solution, cheapest, solve
from kvloom.allocate._units import Choice, Place, Unit, paired_units
from kvloom.errors import PlanError
from kvloom.plan import TensorSpec

_SECONDS = 60.0
"""Time the search may take; then the best plan found counts, with the gap that is left."""

_SCALE = 1000.0
"""What the loss without side constraints is scaled to, so that HiGHS's absolute tolerances mean little."""

Row = tuple[dict[int, float], float, float]
"""Coefficients by variable, least and largest value."""


@dataclass(frozen=True, slots=True)
class Constrained:
    """A solved program.

    Attributes:
        units: the units as constrained: without choices that no plan may have, and of pairs where layouts count.
        solution: their picks, and the proof.
    """

    units: tuple[Unit, ...]
    solution: Solution


def solve_constrained(units: Sequence[Unit], capacity: int, constraints: Constraints) -> Constrained:
    """Finds the picks of least loss within the capacity that keep to the constraints.

    Args:
        units: as `units_of` gives them.
        capacity: bytes.
        constraints: what else must hold.

    Raises:
        MissingExtraError: scipy is not installed.
        PlanError: no picks keep to the constraints, whatever they cost, or none within the capacity do.
    """
    own, program = _program(units, constraints)
    least = program.least_cost()
    if least > capacity:
        raise PlanError(
            f"the smallest plan with {constraints} takes {least} bytes, and the budget is {capacity}: raise the "
            "budget or loosen the constraints"
        )
    return Constrained(own, program.solve(capacity))


def least_cost(units: Sequence[Unit], constraints: Constraints) -> int:
    """Bytes of the smallest picks that keep to the constraints.

    Raises:
        MissingExtraError: there are constraints, and scipy is not installed.
        PlanError: no picks keep to them.
    """
    if not constraints:
        return cheapest([unit.options for unit in units])
    return _program(units, constraints)[1].least_cost()


def _program(units: Sequence[Unit], constraints: Constraints) -> tuple[tuple[Unit, ...], _Program]:
    require("milp", "A plan with side constraints")
    own = tuple(_allowed(unit, constraints) for unit in (paired_units(units) if constraints.max_layouts else units))
    return own, _Program(own, constraints)


def _allowed(unit: Unit, constraints: Constraints) -> Unit:
    """The unit without choices of too few bits."""
    bits = constraints.protect.get(unit.layer, 0)
    kept = np.array([n for n, own in enumerate(unit.choices) if all(spec.bits >= bits for spec in own.values())])
    if not len(kept):
        raise PlanError(f"protect asks for {bits} bits in layer {unit.layer}, and no candidate has so many: lower it")
    return unit.only(kept)


class _Program:
    """The variables, a range of them for each unit and then one for each layout, and the rows that bind them."""

    def __init__(self, units: Sequence[Unit], constraints: Constraints) -> None:
        self._units, self._constraints = units, constraints
        self._first = np.cumsum([0, *(len(unit.choices) for unit in units)])
        self._layouts = self._layout_variables()
        self._rows = [*self._one_each(), *self._equal(), *self._paired(), *self._few_layouts()]

    def least_cost(self) -> int:
        """Bytes of the smallest picks that keep to the constraints.

        Raises:
            PlanError: there are none.
        """
        cost = self._vector([unit.options.cost for unit in self._units])
        result = self._run(cost, [])
        if result.x is None:
            raise PlanError(f"no plan of the profile's candidates has {self._constraints}: loosen the constraints")
        return self._cost(self._picks(result.x))

    def solve(self, capacity: int) -> Solution:
        """The picks of least loss; `capacity` is at least `least_cost`."""
        free = solve([unit.options for unit in self._units], capacity)
        scale = _SCALE / abs(free.bound) if free.bound else 1.0
        loss = self._vector([unit.options.loss for unit in self._units]) * scale
        bound, limit = -np.inf, capacity
        while True:
            result = self._run(loss, [self._capacity_row(limit)])
            if result.x is None:
                raise PlanError(
                    f"no plan was found in {_SECONDS:g} seconds: raise the budget or loosen the constraints"
                )
            bound = max(bound, result.mip_dual_bound / scale) if limit == capacity else bound
            picks = self._picks(result.x)
            if (used := self._cost(picks)) <= capacity:
                break
            limit -= used - capacity  # a variable of 0.999999 let them pass
        total = float(sum(unit.options.loss[pick] for unit, pick in zip(self._units, picks, strict=True)))
        bound = max(bound, free.bound)
        return Solution(picks, used, total, min(bound, total), is_optimal=bound >= total - _tolerance(total))

    def _run(self, objective: NDArray[np.float64], more: list[Row]) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows = [*self._rows, *more]
        return milp(
            objective,
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                self._matrix(rows), np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
            ),
            options={"time_limit": _SECONDS, "mip_rel_gap": 0.0},
        )

    def _matrix(self, rows: Sequence[Row]) -> Any:
        from scipy.sparse import csr_array

        where = [(row, column) for row, (entries, _, _) in enumerate(rows) for column in entries]
        values = [value for entries, _, _ in rows for value in entries.values()]
        return csr_array((values, tuple(zip(*where, strict=True))), shape=(len(rows), self._variables))

    @property
    def _variables(self) -> int:
        return int(self._first[-1]) + len(self._layouts)

    def _vector(self, parts: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        return np.concatenate([*parts, np.zeros(len(self._layouts))], dtype=np.float64)

    def _picks(self, solution: NDArray[np.float64]) -> tuple[int, ...]:
        spans = pairwise(self._first)
        return tuple(int(solution[start:stop].argmax()) for start, stop in spans)

    def _cost(self, picks: Sequence[int]) -> int:
        return sum(int(unit.options.cost[pick]) for unit, pick in zip(self._units, picks, strict=True))

    def _capacity_row(self, capacity: int) -> Row:
        cost = self._vector([unit.options.cost for unit in self._units])
        return {int(n): float(cost[n]) for n in np.flatnonzero(cost)}, -np.inf, float(capacity)

    def _one_each(self) -> Iterator[Row]:
        for start, stop in pairwise(self._first):
            yield dict.fromkeys(range(start, stop), 1.0), 1.0, 1.0

    def _of_bits(self, place: Place, side: str, bits: int) -> list[int]:
        """Variables of the place's choices that store `side` in so many bits."""
        return [n for n, own in self._choices[place] if side in own and own[side].bits == bits]

    @cached_property
    def _choices(self) -> dict[Place, list[tuple[int, Choice]]]:
        """Variables of each place, and what they stand for."""
        found: dict[Place, list[tuple[int, Choice]]] = {}
        for start, unit in zip(self._first, self._units, strict=False):
            found.setdefault(unit.place, []).extend(enumerate(unit.choices, int(start)))
        return found

    def _widths(self, side: str) -> list[int]:
        return sorted({int(own[side].bits) for unit in self._units for own in unit.choices if side in own})

    def _equal(self) -> Iterator[Row]:
        """Neighbours in a block have each width equally often: both or neither."""
        layers = list(dict.fromkeys(unit.layer for unit in self._units))
        heads = list(dict.fromkeys(unit.head for unit in self._units))
        for n, (one, other) in enumerate(pairwise(layers), start=1):
            if n % self._constraints.equal_in:
                for head, side in product(heads, ("key", "value")):
                    for bits in self._widths(side):
                        entries = dict.fromkeys(self._of_bits((one, head), side, bits), 1.0)
                        yield entries | dict.fromkeys(self._of_bits((other, head), side, bits), -1.0), 0.0, 0.0

    def _paired(self) -> Iterator[Row]:
        """Keys of a width ask for values of one of the widths it may go with."""
        pairs = self._constraints.pairs
        if pairs is None:
            return
        for place in self._choices:
            for bits in self._widths("key"):
                entries = dict.fromkeys(self._of_bits(place, "key", bits), 1.0)
                for other in (value for key, value in pairs if key == bits):
                    for variable in self._of_bits(place, "value", other):
                        entries[variable] = entries.get(variable, 0.0) - 1.0
                yield entries, -np.inf, 0.0

    def _layout_variables(self) -> dict[tuple[TensorSpec, TensorSpec], int]:
        """A variable for each pair of formats, where layouts count: whether any layer has it."""
        if self._constraints.max_layouts is None:
            return {}
        known = dict.fromkeys((own["key"], own["value"]) for unit in self._units for own in unit.choices)
        return {pair: int(self._first[-1]) + n for n, pair in enumerate(known)}

    def _few_layouts(self) -> Iterator[Row]:
        if self._constraints.max_layouts is None:
            return
        yield dict.fromkeys(self._layouts.values(), 1.0), 1.0, float(self._constraints.max_layouts)
        for start, unit in zip(self._first, self._units, strict=False):
            for n, own in enumerate(unit.choices, int(start)):
                yield {n: 1.0, self._layouts[own["key"], own["value"]]: -1.0}, -np.inf, 0.0


def _tolerance(loss: float) -> float:
    """What HiGHS's bound may lack of a loss that it has proven."""
    return 1e-7 * abs(loss)
