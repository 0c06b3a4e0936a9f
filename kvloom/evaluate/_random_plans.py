"""Random plans: recipes of which nobody knows beforehand how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvloom.errors import DataError
from kvloom.evaluate._correlation import LEAST_PAIRS
from kvloom.plan import Fingerprint, LayerPlan, Plan, TensorSpec, Window, full_pages, head_layouts

Group = Literal["spread", "equal"]

_DRAWS = 256
"""Of which the one closest to its target is taken: with 30 layers it is 0.001 bits away."""


@dataclass(frozen=True)
class PlanCounts:
    """How many random plans, of which true bits; none or at least 4 of a kind, or there is nothing to correlate.

    Attributes:
        spread: plans with true bits in even steps from `low` to `high`.
        equal: plans of nearly equal true bits.
        bits: true bits of those.
        low: least true bits.
        high: most true bits.
        seed: of the draws.
    """

    spread: int = 200
    equal: int = 100
    bits: float = 3.0
    low: float = 2.2
    high: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("spread", "equal"):
            if getattr(self, name) != 0 and getattr(self, name) < LEAST_PAIRS:
                raise DataError(f"{name} is {getattr(self, name)}: give at least {LEAST_PAIRS} plans, or 0.")


@dataclass(frozen=True)
class RandomPlan:
    """A plan whose layers and sides drew their formats independently.

    Attributes:
        name: unique among plans of one size and seed.
        group: `spread`: true bits in even steps; `equal`: all nearly the same.
        plan: what it stores.
        specs: (key, value) formats by layer.
    """

    name: str
    group: Group
    plan: Plan
    specs: dict[int, tuple[TensorSpec, TensorSpec]]


def random_plans(
    model: Fingerprint,
    key_specs: Sequence[TensorSpec],
    value_specs: Sequence[TensorSpec],
    *,
    window: Window,
    tokens: int,
    counts: PlanCounts,
) -> list[RandomPlan]:
    """Draw plans of given true bits.

    Every layer's keys and values draw a format with weight `exp(-(b - t)^2 / 2 - lambda b)`: formats scatter by about
    one bit around the plan's target `t`, and `lambda` makes `t` their mean (`b` are the bits of a full page's element).
    Of 256 draws the one closest to its target is taken.

    Args:
        model: what the plans are for.
        key_specs: formats to draw from.
        value_specs: likewise.
        window: tokens that stay exact.
        tokens: context at which true bits are meant.
        counts: how many of which true bits.

    Raises:
        DataError: the formats cannot make a plan of that many true bits.
    """
    pool = _Pool.of(model, key_specs, value_specs, window, tokens)
    generator = np.random.default_rng(counts.seed)
    steps = np.linspace(counts.low, counts.high, counts.spread)
    targets: list[tuple[Group, float]] = [("spread", float(target)) for target in steps]
    targets += [("equal", counts.bits)] * counts.equal
    made = []
    for number, (group, target) in enumerate(targets):
        keys, values = pool.draw(target, len(model.packed_layers), generator)
        pairs = zip(model.packed_layers, keys, values, strict=True)
        specs = {layer: (key_specs[k], value_specs[v]) for layer, k, v in pairs}
        plan = Plan.from_specs(model, specs, window=window, prefill="quantized")
        made.append(RandomPlan(f"{group} {number} at {target:.3g} of seed {counts.seed}", group, plan, specs))
    return made


@dataclass(frozen=True)
class _Pool:
    """Formats to draw from.

    Attributes:
        key: `[key_specs]` bits of an element in a full page.
        value: `[value_specs]` likewise.
        packed: share of the tokens that are in full pages.
    """

    key: NDArray[np.float64]
    value: NDArray[np.float64]
    packed: float

    @classmethod
    def of(
        cls, model: Fingerprint, keys: Sequence[TensorSpec], values: Sequence[TensorSpec], window: Window, tokens: int
    ) -> _Pool:
        layouts = [
            [head_layouts(LayerPlan(layers=0, key=k, value=v), 1, model.head_dim, 2)[0] for v in values] for k in keys
        ]
        page = max(layout.page_tokens for row in layouts for layout in row)
        return cls(
            key=np.array([8 * row[0].key.nbytes / (row[0].page_tokens * model.head_dim) for row in layouts]),
            value=np.array([8 * lay.value.nbytes / (lay.page_tokens * model.head_dim) for lay in layouts[0]]),
            packed=full_pages(window, tokens, page) * page / tokens,
        )

    def draw(
        self, bits: float, layers: int, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Formats of every layer's keys, and of its values, that make a plan of `bits` true bits."""
        target = (bits - 16 * (1 - self.packed)) / self.packed if self.packed else 16.0
        tilt = self._tilt(target)
        if tilt is not None:
            odds = [_odds(costs, target, tilt) for costs in (self.key, self.value)]
            keys, values = (generator.choice(len(p), (_DRAWS, layers), p=p) for p in odds)
            means = (self.key[keys].mean(axis=1) + self.value[values].mean(axis=1)) / 2
            closest = np.argmin(np.abs(means - target))
            return keys[closest], values[closest]
        raise DataError(
            f"no random plan of these formats has {bits:.3g} true bits: give other bits, or longer windows, of which "
            "the exact tokens are a smaller part."
        )

    def _tilt(self, target: float) -> float | None:
        """The lambda whose mean is the target, by bisection; None if there is none."""
        low, high = -50.0, 50.0
        if not self._mean(target, high) <= target <= self._mean(target, low):
            return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean(target, middle) > target else (low, middle)
        return low

    def _mean(self, target: float, tilt: float) -> float:
        means = [float(_odds(costs, target, tilt) @ costs) for costs in (self.key, self.value)]
        return sum(means) / 2


def _odds(costs: NDArray[np.float64], target: float, tilt: float) -> NDArray[np.float64]:
    away = costs - target
    exponents = -(away**2) / 2 - tilt * away
    weights = np.exp(exponents - exponents.max())
    odds: NDArray[np.float64] = weights / weights.sum()
    return odds
