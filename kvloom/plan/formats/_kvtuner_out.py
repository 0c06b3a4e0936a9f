"""A plan as KVTuner's cache configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from kvloom.errors import PlanError
from kvloom.plan._plan import Plan
from kvloom.plan._spec import LayerPlan, TensorSpec, Window
from kvloom.plan.formats._axes import Backend, axis_of, codec_of, residual_window, symmetric_note
from kvloom.plan.formats._deviations import Deviations

T = TypeVar("T")
_MAX_BITS = 8


def config_of(plan: Plan, deviations: Deviations) -> dict[str, Any]:
    """Fields of a `FlexibleQuantizedCacheConfig` that says what ``plan`` says.

    Raises:
        PlanError: The plan has sinks, a ratio, eviction, exact layers, or formats that differ in more than bits.
    """
    if plan.model.packed_layers != tuple(range(plan.model.num_layers)):
        raise PlanError(
            "model.packed_layers leaves layers out and KVTuner quantises every one: keep kvloom's own file."
        )
    specs = [spec for _, pairs in _pairs(plan) for pair in pairs for spec in pair]
    backend = _backend(specs)
    for spec in specs:
        _check(spec, backend, deviations)
    keys = [key for _, pairs in _pairs(plan) for key, _ in pairs]
    values = [value for _, pairs in _pairs(plan) for _, value in pairs]
    symmetric = _same(specs, lambda s: s.symmetric, "symmetric")
    if symmetric:
        symmetric_note(deviations)
    return {
        "backend": backend,
        "nbits": -1,
        "nbits_key": -1,
        "nbits_value": -1,
        "axis_key": axis_of(backend, _same(keys, lambda s: s.grouping, "grouping of keys"), "grouping of keys"),
        "axis_value": axis_of(backend, _same(values, lambda s: s.grouping, "grouping of values"), "grouping of values"),
        "asym": not symmetric,
        "q_group_size": _group_size(specs, plan.model.head_dim),
        "residual_length": _residual(plan.layers, deviations),
        "force_quant": plan.prefill == "quantized",
        **_tables(plan),
    }


def _pairs(plan: Plan) -> list[tuple[int, list[tuple[TensorSpec, TensorSpec]]]]:
    heads = range(plan.model.num_kv_heads)
    return [(layer, [plan.spec(layer).head(h) for h in heads]) for layer in plan.model.packed_layers]


def _tables(plan: Plan) -> dict[str, Any]:
    def bits(pair: tuple[TensorSpec, TensorSpec]) -> dict[str, int]:
        return {"nbits_key": pair[0].bits, "nbits_value": pair[1].bits}

    if any(entry.heads for entry in plan.layers):
        table = {layer: {head: bits(pair) for head, pair in enumerate(pairs)} for layer, pairs in _pairs(plan)}
        return {"per_head_quant": True, "per_head_config": table}
    return {"per_layer_quant": True, "per_layer_config": {layer: bits(pairs[0]) for layer, pairs in _pairs(plan)}}


def _backend(specs: list[TensorSpec]) -> Backend:
    """Whose quantiser the plan means."""
    return "hqq" if all(spec.codec == "hqq" for spec in specs) else "vanilla"


def _check(spec: TensorSpec, backend: Backend, deviations: Deviations) -> None:
    if spec.codec != codec_of(backend, spec.bits, spec.grouping, deviations) and spec.codec != "affine":
        raise PlanError(
            f"codec {spec.codec!r} of {spec.bits} bits {spec.grouping} is none of KVTuner's: choose 'affine', or keep "
            "kvloom's own file."
        )
    if spec.rotation:
        raise PlanError("rotation is set and KVTuner turns nothing: remove it, or keep kvloom's own file.")
    if spec.outliers:
        raise PlanError("outliers are set and KVTuner keeps none: leave them out, or keep kvloom's own file.")
    if spec.pre_rope:
        raise PlanError("pre_rope is set and KVTuner packs keys after RoPE: leave it out, or keep kvloom's own file.")
    if spec.bits > _MAX_BITS:
        raise PlanError(
            f"bits {spec.bits} is above the 8 that KVTuner stores: give such layers 8, or keep kvloom's own file."
        )


def _group_size(specs: list[TensorSpec], head_dim: int) -> int:
    if all(spec.group_size == "head_dim" for spec in specs):
        return -1
    sizes: list[int] = [spec.format(head_dim).group_size for spec in specs]
    return _same(sizes, int, "group_size of keys and values")


def _residual(entries: Iterable[LayerPlan], deviations: Deviations) -> int:
    if any(entry.evict for entry in entries):
        raise PlanError("evict is set and KVTuner keeps every token: remove it, or keep kvloom's own file.")
    window: Window = _same(entries, lambda entry: entry.window, "window")
    if window.sinks or window.recent_ratio:
        field = "sinks" if window.sinks else "recent_ratio"
        raise PlanError(f"window.{field} is set and KVTuner knows recent tokens only: set window.recent alone.")
    return residual_window(window.recent, deviations).recent


def _same(items: Iterable[Any], of: Callable[[Any], T], field: str) -> T:
    """The one value that all ``items`` have."""
    found = {repr(of(item)): of(item) for item in items}
    if len(found) > 1:
        raise PlanError(f"{field} differs ({', '.join(found)}) and KVTuner has one for all: only bits may differ.")
    return next(iter(found.values()))
