"""The knapsack's units: what each layer may store, what it costs in bytes and what it loses.

Only this file knows the shape of a loss table and of a plan's layers; methods see units, and picks of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvloom.allocate._budget import Budget
from kvloom.allocate._knapsack import Options
from kvloom.errors import PlanError
from kvloom.plan import LayerPlan, TensorSpec, Window, full_pages, head_layouts, itemsize
from kvloom.signals import LossTable

Choice = dict[str, TensorSpec]
Specs = dict[int, tuple[TensorSpec, TensorSpec]]
"""(key, value) formats by layer index."""

Place = tuple[int, int | None]
"""A layer and one of its KV heads, or None for all of them."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One independent decision.

    Attributes:
        layer: the layer it is about.
        choices: what each option stores as the layer's `key`, its `value`, or both.
        options: the options' costs in bytes and predicted losses, in the order of `choices`.
        head: the KV head it is about; None: all heads of the layer, which store the same.
    """

    layer: int
    choices: tuple[Choice, ...]
    options: Options
    head: int | None = None

    @property
    def place(self) -> Place:
        """What it is about."""
        return self.layer, self.head

    def only(self, kept: NDArray[np.int64]) -> Unit:
        """The unit with some of its choices."""
        return replace(self, choices=tuple(self.choices[n] for n in kept), options=self.options[kept])


def units_of(table: LossTable, budget: Budget, window: Window, by_head: bool = False) -> list[Unit]:
    """All decisions of a plan; their costs add up to `plan.nbytes` and their losses to its loss.

    A layer's keys and values are independent while every candidate fits into pages of the same
    length. Where a table mixes page lengths (a `per_channel` group above 64 tokens lengthens its
    layer's page, and with it the exact tail of the other side), a layer is one unit of all pairs.

    Args:
        table: the candidates and their losses.
        budget: batch, tokens and compute dtype that bytes count at.
        window: tokens every layer keeps exactly.
        by_head: whether every KV head decides by itself.

    Raises:
        PlanError: a candidate does not fit the model's `head_dim`; or heads are to decide, and the table does not tell
            them apart, or a candidate's bytes depend on what the other heads store.
    """
    costs = _Costs.of(table, budget, window, by_head)
    if by_head:
        _check_heads(table, costs)
    return list(_sides(table, costs, by_head) if costs.separable else _pairs(table, costs))


def specs_of(units: Sequence[Unit], picks: Sequence[int], heads: int) -> dict[int, list[tuple[TensorSpec, TensorSpec]]]:
    """(key, value) formats of each of `heads` KV heads by layer index, under these picks, one of every unit."""
    layers: dict[int, list[Choice]] = {}
    for unit, pick in zip(units, picks, strict=True):
        sides = layers.setdefault(unit.layer, [{} for _ in range(heads)])
        for own in sides if unit.head is None else [sides[unit.head]]:
            own.update(unit.choices[pick])
    return {layer: [(own["key"], own["value"]) for own in sides] for layer, sides in layers.items()}


def picks_of(units: Sequence[Unit], specs: Specs) -> tuple[int, ...]:
    """The picks under which all heads of a layer store this.

    Raises:
        ValueError: a format is not among the choices.
    """
    sides = {layer: {"key": key, "value": value} for layer, (key, value) in specs.items()}
    return tuple(unit.choices.index({side: sides[unit.layer][side] for side in unit.choices[0]}) for unit in units)


def side_losses(table: LossTable) -> dict[int, tuple[list[float], list[float]]]:
    """Losses of each layer's keys, `[key_specs]`, and of its values, `[value_specs]`, by layer index."""
    return dict(zip(table.layers, zip(table.key_loss, table.value_loss, strict=True), strict=True))


def paired_units(units: Sequence[Unit]) -> list[Unit]:
    """The same decisions with one unit a layer (or head), whose choices are all pairs of keys and values."""
    places: dict[Place, Unit] = {}
    for unit in units:
        places[unit.place] = _joined(places[unit.place], unit) if unit.place in places else unit
    return list(places.values())


def _joined(one: Unit, other: Unit) -> Unit:
    """A unit of every pair of choices of two units of one place."""
    return Unit(
        one.layer,
        tuple({**a, **b} for a in one.choices for b in other.choices),
        Options(
            np.add.outer(one.options.cost, other.options.cost).ravel(),
            np.add.outer(one.options.loss, other.options.loss).ravel(),
        ),
        one.head,
    )


def _sides(table: LossTable, costs: _Costs, by_head: bool) -> Iterator[Unit]:
    keys = tuple({"key": spec} for spec in table.key_specs)
    values = tuple({"value": spec} for spec in table.value_specs)
    for (layer, head), key_loss, value_loss in _head_losses(table) if by_head else _layer_losses(table):
        yield Unit(layer, keys, Options(costs.key[:, 0], np.array(key_loss)), head)
        yield Unit(layer, values, Options(costs.value[0], np.array(value_loss)), head)


def _layer_losses(table: LossTable) -> Iterator[tuple[Place, list[float], list[float]]]:
    """Losses of each layer's keys, `[key_specs]`, and of its values, `[value_specs]`."""
    for layer, key, value in zip(table.layers, table.key_loss, table.value_loss, strict=True):
        yield (layer, None), key, value


def _head_losses(table: LossTable) -> Iterator[tuple[Place, list[float], list[float]]]:
    """The same of each KV head; the table tells them apart."""
    assert table.key_head_loss is not None
    assert table.value_head_loss is not None
    for layer, keys, values in zip(table.layers, table.key_head_loss, table.value_head_loss, strict=True):
        for head, (key, value) in enumerate(zip(keys, values, strict=True)):
            yield (layer, head), key, value


def _pairs(table: LossTable, costs: _Costs) -> Iterator[Unit]:
    pairs = tuple({"key": k, "value": v} for k in table.key_specs for v in table.value_specs)
    cost = (costs.key + costs.value).ravel()
    for layer, key_loss, value_loss in zip(table.layers, table.key_loss, table.value_loss, strict=True):
        yield Unit(layer, pairs, Options(cost, np.add.outer(key_loss, value_loss).ravel()))


def _check_heads(table: LossTable, costs: _Costs) -> None:
    """Refuses a table whose heads cannot decide by themselves.

    Raises:
        PlanError: it does not tell heads apart, or bytes of a head depend on the other heads.
    """
    if table.key_head_loss is None or table.value_head_loss is None:
        raise PlanError(
            f"the profile of signal {table.signal!r} does not tell KV heads apart: profile with one that does, such as "
            "error_gradient, or leave by_head out"
        )
    if not costs.separable:
        raise PlanError(
            "the profile's candidates need pages of different lengths, and heads of a layer share one: leave groups "
            "above 64 tokens out of the candidates, or by_head"
        )
    if shared := [spec.label for spec in (*table.key_specs, *table.value_specs) if spec.is_calibrated]:
        raise PlanError(
            f"candidate {shared[0]} has a codebook, which all heads of a layer share: leave it out of the candidates, "
            "or by_head"
        )


@dataclass(frozen=True, slots=True)
class _Costs:
    """Bytes of one layer's (or KV head's) keys and of its values, for every pair of candidates.

    Attributes:
        key: [key_specs, value_specs] int64.
        value: [key_specs, value_specs] int64.
        separable: all pairs have pages of one length, so that no side's cost depends on the other.
    """

    key: NDArray[np.int64]
    value: NDArray[np.int64]
    separable: bool

    @classmethod
    def of(cls, table: LossTable, budget: Budget, window: Window, by_head: bool) -> _Costs:
        dim, size = table.model.head_dim, itemsize(budget.dtype or table.model.dtype)
        sides = np.empty((2, len(table.key_specs), len(table.value_specs)), dtype=np.int64)
        lengths, copies = set(), budget.batch * (1 if by_head else table.model.num_kv_heads)
        for i, key in enumerate(table.key_specs):
            for j, value in enumerate(table.value_specs):
                (page,) = head_layouts(LayerPlan(layers=0, key=key, value=value), 1, dim, size)
                pages = full_pages(window, budget.tokens, page.page_tokens)
                tail = (budget.tokens - pages * page.page_tokens) * dim * size
                sides[:, i, j] = [
                    copies * (pages * side.nbytes + tail) + side.fmt.codebook_nbytes for side in (page.key, page.value)
                ]
                lengths.add(page.page_tokens)
        return cls(key=sides[0], value=sides[1], separable=len(lengths) == 1)
