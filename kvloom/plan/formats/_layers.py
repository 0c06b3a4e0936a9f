"""From a table of layers to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan, Prefill
from kvloom.plan._spec import LayerPlan, format_layers
from kvloom.plan._validate import validated

T = TypeVar("T")


def packed_rows(table: Mapping[int, T], model: Fingerprint, field: str) -> dict[int, T]:
    """``table`` in the order of the model's packed layers.

    Raises:
        PlanError: It names another layer, or leaves one out.
    """
    packed = set(model.packed_layers)
    have = format_layers(list(model.packed_layers))
    if extra := sorted(set(table) - packed):
        raise PlanError(
            f"{field} names layer {format_layers(extra)}, and the model's full-attention layers are {have}: take the "
            "table of this model, or remove what it lacks."
        )
    if missing := sorted(packed - set(table)):
        raise PlanError(
            f"{field} leaves out layer {format_layers(missing)} of the model's full-attention layers {have}: add it."
        )
    return {layer: table[layer] for layer in model.packed_layers}


def plan_of(model: Fingerprint, entries: Iterable[LayerPlan], prefill: Prefill = "exact") -> Plan:
    """Plan from an entry a layer; layers that store the same share an entry."""
    groups: dict[str, list[LayerPlan]] = {}
    for entry in entries:
        groups.setdefault(entry.model_copy(update={"layers": 0}).model_dump_json(), []).append(entry)
    shared = [
        group[0].model_copy(update={"layers": format_layers([i for entry in group for i in entry.indices])})
        for group in groups.values()
    ]
    return validated(Plan, {"model": model, "layers": shared, "prefill": prefill}, "the plan")
