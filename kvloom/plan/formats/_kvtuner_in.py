"""KVTuner's cache configuration as a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from kvloom.errors import PlanError
from kvloom.pages import Grouping
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import HeadPlan, LayerPlan, TensorSpec
from kvloom.plan._validate import validated
from kvloom.plan.formats._axes import (
    Backend,
    check_bits,
    codec_of,
    group_size_of,
    grouping_of,
    residual_window,
    run_settings,
    symmetric_note,
)
from kvloom.plan.formats._base import Document
from kvloom.plan.formats._deviations import Deviations
from kvloom.plan.formats._document import read_document
from kvloom.plan.formats._layers import packed_rows, plan_of


class Pair(Document):
    """Bits of a layer, or of a head."""

    nbits_key: int
    nbits_value: int


class Config(Document):
    """`FlexibleQuantizedCacheConfig` with its defaults.

    One of them differs: ``backend`` names the quantiser that runs, "vanilla" by default as in KVTuner's readme; in
    KVTuner it defaults to "quanto" and decides nothing, the cache class does.
    """

    backend: Backend = "vanilla"
    nbits: int = 4
    nbits_key: int = 0
    nbits_value: int = 0
    axis_key: int = 0
    axis_value: int = 0
    asym: bool = False
    q_group_size: int = 64
    residual_length: int = Field(default=128, ge=0)
    compute_dtype: Any = None
    device: Any = None
    force_quant: bool = False
    per_layer_quant: bool = False
    per_layer_config: dict[int, Pair] | None = None
    per_layer_config_path: Path | None = None
    per_head_quant: bool = False
    per_head_config: dict[int, dict[int, Pair]] | None = None
    per_head_config_path: Path | None = None


Table = dict[int, tuple[Pair, ...]]
"""Layer -> a pair for each KV head."""


def plan_of_config(config: Config, model: Fingerprint, deviations: Deviations) -> Plan:
    """The plan that ``config`` means.

    Raises:
        PlanError: It says what a plan cannot, or its table does not fit the model.
    """
    key = grouping_of(config.backend, config.axis_key, "axis_key")
    value = grouping_of(config.backend, config.axis_value, "axis_value")
    window = residual_window(config.residual_length, deviations)
    run_settings(config.model_dump(include={"compute_dtype", "device"}), model, deviations)
    symmetric = _symmetric(config, deviations)

    def spec(bits: int, grouping: Grouping) -> TensorSpec:
        size = group_size_of(config.q_group_size, grouping, model, "q_group_size")
        codec = codec_of(config.backend, bits, grouping, deviations)
        return TensorSpec.model_validate(
            {"codec": codec, "bits": bits, "grouping": grouping, "group_size": size, "symmetric": symmetric}
        )

    def head(pair: Pair) -> tuple[TensorSpec, TensorSpec]:
        return spec(pair.nbits_key, key), spec(pair.nbits_value, value)

    entries = []
    for layer, pairs in _table(config, model, deviations).items():
        (keys, values), *others = [head(pair) for pair in pairs]
        apart = {h: _differing(keys, values, *other) for h, other in enumerate(others, 1) if other != (keys, values)}
        entries.append(LayerPlan(layers=layer, key=keys, value=values, window=window, heads=apart))
    return plan_of(model, entries, "quantized" if config.force_quant else "exact")


def _differing(layer_key: TensorSpec, layer_value: TensorSpec, key: TensorSpec, value: TensorSpec) -> HeadPlan:
    return HeadPlan(key=None if key == layer_key else key, value=None if value == layer_value else value)


def _symmetric(config: Config, deviations: Deviations) -> bool:
    if config.backend == "vanilla":
        if not config.asym:
            symmetric_note(deviations)
        return not config.asym
    if "asym" in config.model_fields_set and not config.asym:
        deviations.note(f"asym false is read by the vanilla quantiser only: {config.backend}'s grid is asymmetric")
    return False


def _table(config: Config, model: Fingerprint, deviations: Deviations) -> Table:
    """The bits of every head of every packed layer, checked."""
    if config.per_layer_quant and config.per_head_quant:
        raise PlanError("per_layer_quant and per_head_quant are both true: KVTuner takes one of them.")
    for kind in ("per_layer", "per_head"):
        _refuse_unread(config, kind)
    if not (config.per_layer_quant or config.per_head_quant):
        pair = Pair(nbits_key=config.nbits_key or config.nbits, nbits_value=config.nbits_value or config.nbits)
        _check(config.backend, pair, "")
        return dict.fromkeys(model.packed_layers, (pair,) * model.num_kv_heads)
    for field in ("nbits", "nbits_key", "nbits_value"):
        if getattr(config, field) > 0 and field in config.model_fields_set:
            deviations.note(f"{field} {getattr(config, field)} is not used: the table gives the bits, as in KVTuner")
    return _per_layer(config, model) if config.per_layer_quant else _per_head(config, model)


def _per_layer(config: Config, model: Fingerprint) -> Table:
    table = config.per_layer_config or _load(config, "per_layer").per_layer_config or {}
    rows = packed_rows(table, model, "per_layer_config")
    for layer, pair in rows.items():
        _check(config.backend, pair, f"per_layer_config.{layer}.")
    return {layer: (pair,) * model.num_kv_heads for layer, pair in rows.items()}


def _per_head(config: Config, model: Fingerprint) -> Table:
    table = config.per_head_config or _load(config, "per_head").per_head_config or {}
    rows = packed_rows(table, model, "per_head_config")
    for layer, heads in rows.items():
        if sorted(heads) != list(range(model.num_kv_heads)):
            raise PlanError(
                f"per_head_config.{layer} names heads {sorted(heads)}: the model has 0 to {model.num_kv_heads - 1}."
            )
        for head, pair in heads.items():
            _check(config.backend, pair, f"per_head_config.{layer}.{head}.")
    return {layer: tuple(heads[head] for head in sorted(heads)) for layer, heads in rows.items()}


def _load(config: Config, kind: str) -> Config:
    """A configuration that holds the table which ``config`` gives by its path."""
    path = getattr(config, f"{kind}_config_path")
    if path is None:
        raise PlanError(f"{kind}_quant is true without a table: give {kind}_config or {kind}_config_path.")
    return validated(Config, {f"{kind}_config": read_document(path)}, str(path))


def _refuse_unread(config: Config, kind: str) -> None:
    given = [field for field in (f"{kind}_config", f"{kind}_config_path") if getattr(config, field) is not None]
    if given and not getattr(config, f"{kind}_quant"):
        raise PlanError(f"{given[0]} is given and {kind}_quant is false: set it to true, or remove the table.")
    if len(given) > 1:
        raise PlanError(f"{given[0]} and {given[1]} are both given: remove one.")


def _check(backend: Backend, pair: Pair, where: str) -> None:
    check_bits(backend, pair.nbits_key, f"{where}nbits_key")
    check_bits(backend, pair.nbits_value, f"{where}nbits_value")
