"""The later KVQ ("Norm-Aware KVQuant", mohsenhariri/spectral-kv): bits and groups fixed, or bought from a budget."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import LayerPlan, TensorSpec, Window
from kvloom.plan._validate import validated
from kvloom.plan.formats._axes import (
    check_bits,
    group_size_of,
    grouping_of,
    residual_window,
    run_settings,
)
from kvloom.plan.formats._base import Document, PlanFormat, register
from kvloom.plan.formats._deviations import Deviations
from kvloom.plan.formats._document import read_document
from kvloom.plan.formats._layers import packed_rows, plan_of
from kvloom.plan.formats._norm_budget import spend_bits, spend_groups

_WIDTHS = (1.0, 1.58, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Its default ``bit_range`` (`const.py`): hqq's widths and 3.5."""
_SIZES = (16, 32, 64, 128, 256)


def _for_both(given: Any) -> Any:
    return given if given is None or isinstance(given, dict) else {"k": given, "v": given}


def _opened(given: Any) -> Any:
    return read_document(given) if isinstance(given, str) else given


class Widths(Document):
    """Bits of keys and values; one number means both."""

    k: float
    v: float


class Counts(Document):
    """A number for keys and one for values; one number means both."""

    k: int
    v: int


class Norms(Document):
    """Norms of each layer's key and value projection, as in the JSON files of its ``assets``."""

    w_k: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    w_v: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class Config(Document):
    """`KVQConfig` with its defaults, and the ``norms`` it looks up by ``model``: a table, or the path of one."""

    score: Literal[0, 1] = 0
    nbits: Annotated[Widths | None, BeforeValidator(_for_both)] = None
    budget: Annotated[float, Field(gt=0, le=8)] | None = None
    bit_range: tuple[float, ...] | None = Field(default=None, min_length=1)
    group_size: Annotated[Counts | None, BeforeValidator(_for_both)] = None
    group_budget: Annotated[int, Field(gt=0)] | None = None
    group_range: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(default=None, min_length=1)
    model: str | None = None
    residual_length: Annotated[Counts, BeforeValidator(_for_both)] = Counts(k=64, v=64)
    axis: Annotated[Counts, BeforeValidator(_for_both)] = Counts(k=1, v=1)
    compute_dtype: Any = None
    device: Any = None
    norms: Annotated[Norms | None, BeforeValidator(_opened)] = None


class KVQNorm(PlanFormat):
    """KVQ's later configuration."""

    name = "kvq-norm"

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        config = validated(Config, document, self.name)
        _check_alternatives(config)
        run_settings(config.model_dump(include={"compute_dtype", "device"}), model, deviations)
        window = _window(config.residual_length, deviations)
        bits, sizes = _bits(config, model, deviations), _sizes(config, model)
        return plan_of(model, [_entry(i, bits[i], sizes[i], config, model, window) for i in model.packed_layers])


def _check_alternatives(config: Config) -> None:
    if (config.nbits is None) == (config.budget is None):
        raise PlanError("give nbits or budget, and not both.")
    if config.group_size is not None and config.group_budget is not None:
        raise PlanError("give group_size or group_budget, not both.")
    for field, needs in (("bit_range", "budget"), ("group_range", "group_budget")):
        if getattr(config, field) is not None and getattr(config, needs) is None:
            raise PlanError(f"{field} is given without {needs}, so nothing reads it: remove it.")
    budgets = [name for name in ("budget", "group_budget") if getattr(config, name) is not None]
    if config.norms is None and budgets:
        raise PlanError(
            f"{budgets[0]} is spent by the norms of the model's projections: give norms, a JSON file with w_k and w_v "
            "such as KVQ ships in its assets."
        )
    if config.norms is not None and not budgets:
        raise PlanError("norms are given without budget or group_budget, so nothing reads them: remove them.")


def _bits(config: Config, model: Fingerprint, deviations: Deviations) -> dict[int, tuple[float, float]]:
    if config.nbits is not None:
        return dict.fromkeys(model.packed_layers, (config.nbits.k, config.nbits.v))
    norms = _norms(config, model)
    total = len(norms) * (config.budget or 0)
    widths = spend_bits(norms, total, config.bit_range or _WIDTHS)
    if abs(sum(widths) - total) > 1e-6:
        deviations.note(
            f"budget {config.budget:g} is not met exactly: KVQ's rule spends {sum(widths) / len(widths):.3f} bits"
        )
    return _by_layer(widths, model)


def _sizes(config: Config, model: Fingerprint) -> dict[int, tuple[int, int]]:
    if config.group_budget is not None:
        groups = spend_groups(_norms(config, model), config.group_budget, config.group_range or _SIZES)
        return _by_layer(groups, model)
    size = config.group_size or Counts(k=64, v=64)
    return dict.fromkeys(model.packed_layers, (size.k, size.v))


def _norms(config: Config, model: Fingerprint) -> list[float]:
    """``[K0, V0, K1, V1, ...]``."""
    assert config.norms is not None
    keys, values = config.norms.w_k, config.norms.w_v
    if len(keys) != len(values):
        raise PlanError(f"norms.w_k has {len(keys)} layers and norms.w_v has {len(values)}: give a norm of each.")
    rows = packed_rows(dict(enumerate(zip(keys, values, strict=True))), model, "norms")
    return [norm for row in rows.values() for norm in row]


def _by_layer(flat: list[Any], model: Fingerprint) -> dict[int, tuple[Any, Any]]:
    return dict(zip(model.packed_layers, zip(flat[::2], flat[1::2], strict=True), strict=True))


def _window(length: Counts, deviations: Deviations) -> Window:
    if length.k != length.v:
        deviations.instead(
            f"residual_length is {length.k} for keys and {length.v} for values, which share one window",
            f"{max(length.k, length.v)} for both",
        )
    return residual_window(max(length.k, length.v), deviations)


def _entry(
    layer: int,
    bits: tuple[float, float],
    sizes: tuple[int, int],
    config: Config,
    model: Fingerprint,
    window: Window,
) -> LayerPlan:
    source = "nbits" if config.budget is None else "a width that the budget buys from bit_range"

    def spec(side: Literal["k", "v"], width: float, size: int) -> TensorSpec:
        grouping = grouping_of("hqq", getattr(config.axis, side), f"axis.{side}")
        return TensorSpec.model_validate(
            {
                "codec": "hqq",
                "bits": check_bits("hqq", width, f"{source} ({side}, layer {layer})"),
                "grouping": grouping,
                "group_size": group_size_of(size, grouping, model, f"group_size ({side}, layer {layer})"),
            }
        )

    return LayerPlan(layers=layer, key=spec("k", bits[0], sizes[0]), value=spec("v", bits[1], sizes[1]), window=window)


register(KVQNorm())
