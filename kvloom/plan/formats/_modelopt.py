"""ModelOpt's per-layer KV map, ``kv_cache_quantized_layers`` of schema version 1 (NVIDIA/Model-Optimizer pull 2272).

The map is a part of ``hf_quant_config.json`` and is keyed by attention module; a layer it does not name stays in 16
bits. Its formats are floats with scales calibrated elsewhere. A plan has integers, so what a map and a plan share is
which layer gets which width, and both directions are substitutions.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from kvloom._version import __version__
from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import GroupSize, LayerPlan, TensorSpec, format_layers
from kvloom.plan._validate import validated
from kvloom.plan.formats._base import Document, PlanFormat, register
from kvloom.plan.formats._deviations import Deviations
from kvloom.plan.formats._layers import plan_of

Algo = Literal["FP8", "INT8", "NVFP4", "NVFP4_AFFINE", "FP8_K_NVFP4_V"]
Widths = tuple[int, int]

_MIXED = "MIXED_PRECISION"
_LAYER = re.compile(r"\.(\d+)\.")
_EXACT = TensorSpec(bits=16, grouping="per_token", group_size="head_dim")


@dataclass(frozen=True)
class _Algo:
    """Stand-ins of a format, and what it is."""

    key: TensorSpec
    value: TensorSpec
    is_: str


def _stand_in(bits: Literal[4, 8], group_size: GroupSize, symmetric: bool) -> TensorSpec:
    return TensorSpec(bits=bits, grouping="per_token", group_size=group_size, symmetric=symmetric)


_FP8 = _stand_in(8, "head_dim", True)
_NVFP4 = _stand_in(4, 16, True)
_AFFINE = _stand_in(4, 16, False)
_FP8_IS = "8-bit floats with one scale a tensor"
_NVFP4_IS = "4-bit floats with an 8-bit float scale for 16 channels of a token"

_ALGOS: dict[Algo, _Algo] = {
    "FP8": _Algo(_FP8, _FP8, _FP8_IS),
    "INT8": _Algo(_FP8, _FP8, "8-bit integers with one scale a tensor"),
    "NVFP4": _Algo(_NVFP4, _NVFP4, _NVFP4_IS),
    "NVFP4_AFFINE": _Algo(_AFFINE, _AFFINE, f"{_NVFP4_IS} and a bias"),
    "FP8_K_NVFP4_V": _Algo(_FP8, _NVFP4, f"keys in {_FP8_IS}, values in {_NVFP4_IS}"),
}
_WRITTEN: dict[Widths, Algo] = {(8, 8): "FP8", (4, 4): "NVFP4", (8, 4): "FP8_K_NVFP4_V"}

_ARCHITECTURES = frozenset(
    {
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GptOssForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)
"""Those whose attention modules are called ``model.layers.N.self_attn``."""


class Layer(Document):
    """Format of one attention module."""

    quant_algo: Algo


class Quantization(Document):
    """The ``quantization`` part; what is not about the KV cache is about weights."""

    kv_cache_schema_version: Literal[1]
    kv_cache_quant_algo: Algo | Literal["MIXED_PRECISION"] | None = None
    kv_cache_quantized_layers: dict[str, Layer]
    quant_algo: Any = None
    group_size: Any = None
    quantized_layers: Any = None
    exclude_modules: Any = None
    has_zero_point: Any = None
    pre_quant_scale: Any = None


class Config(Document):
    """``hf_quant_config.json``."""

    producer: dict[str, Any] | None = None
    quantization: Quantization


_WEIGHTS = ("quant_algo", "group_size", "quantized_layers", "exclude_modules", "has_zero_point", "pre_quant_scale")


class ModelOpt(PlanFormat):
    """``hf_quant_config.json`` with a per-layer KV map."""

    name = "modelopt"
    writes = True

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        config = validated(Config, document, self.name).quantization
        if weights := [name for name in _WEIGHTS if getattr(config, name)]:
            deviations.note(f"{', '.join(weights)} of the source are about weights, which a plan does not store")
        algos = {_layer_of(name, model): row.quant_algo for name, row in config.kv_cache_quantized_layers.items()}
        if len(algos) < len(config.kv_cache_quantized_layers):
            raise PlanError("kv_cache_quantized_layers names a layer twice: keep one module a layer.")
        _check_summary(config, set(algos.values()))
        for algo in sorted(set(algos.values())):
            layers = format_layers(sorted(layer for layer, its in algos.items() if its == algo))
            given = _ALGOS[algo]
            deviations.instead(
                f"{algo} in layers {layers} is {given.is_}, which no codec here stores",
                f"keys {given.key.label}, values {given.value.label}",
            )
        return plan_of(model, [_entry(layer, algos.get(layer)) for layer in model.packed_layers])

    def write(self, plan: Plan, deviations: Deviations) -> str:
        """See `PlanFormat.write`; for a model whose weights stay as they are."""
        _check_writable(plan)
        algos = {layer: algo for layer in plan.model.packed_layers if (algo := _algo_of(plan, layer))}
        if plan.prefill == "quantized":
            deviations.note("prefill quantized has no place in the map: the engine decides what a prompt attends to")
        if algos:
            deviations.instead(
                "the plan's integers are no format of ModelOpt, which knows floats with calibrated scales",
                "FP8 for 8 bits and NVFP4 for 4",
            )
        return json.dumps(_document(algos), indent=2) + "\n"


def _layer_of(name: str, model: Fingerprint) -> int:
    numbers = _LAYER.findall(name)
    if len(numbers) != 1:
        raise PlanError(f"kv_cache_quantized_layers.{name} does not name one layer, as model.layers.3.self_attn does.")
    layer = int(numbers[0])
    if layer not in model.packed_layers:
        raise PlanError(
            f"kv_cache_quantized_layers.{name} is not one of the model's full-attention layers "
            f"{format_layers(list(model.packed_layers))}: take the map of this model."
        )
    return layer


def _check_summary(config: Quantization, algos: set[Algo]) -> None:
    """``kv_cache_quant_algo`` says in one word what the map says."""
    said = config.kv_cache_quant_algo
    if said != _summary(algos) and said != _MIXED:
        raise PlanError(
            f"kv_cache_quant_algo {said} and the map ({', '.join(sorted(algos)) or 'empty'}) disagree: mend one."
        )


def _summary(algos: set[Algo]) -> str | None:
    if len(algos) > 1:
        return _MIXED
    return next(iter(algos), None)


def _entry(layer: int, algo: Algo | None) -> LayerPlan:
    if algo is None:
        return LayerPlan(layers=layer, key=_EXACT, value=_EXACT)
    return LayerPlan(layers=layer, key=_ALGOS[algo].key, value=_ALGOS[algo].value)


def _check_writable(plan: Plan) -> None:
    if plan.model.architecture not in _ARCHITECTURES:
        raise PlanError(
            f"model.architecture {plan.model.architecture} has attention modules whose names are not known here: write "
            f"one of {', '.join(sorted(_ARCHITECTURES))}."
        )
    for n, entry in enumerate(plan.layers):
        for field in ("sinks", "recent", "recent_ratio"):
            if getattr(entry.window, field):
                raise PlanError(f"layers[{n}].window.{field} is set and ModelOpt keeps no tokens exact: set it to 0.")
        for field in ("heads", "evict"):
            if getattr(entry, field):
                raise PlanError(f"layers[{n}].{field} is set and ModelOpt's map is of whole layers: remove it.")


def _algo_of(plan: Plan, layer: int) -> Algo | None:
    spec = plan.spec(layer)
    widths = (spec.key.bits, spec.value.bits)
    if widths == (16, 16):
        return None
    if widths not in _WRITTEN:
        raise PlanError(
            f"layer {layer} stores keys in {widths[0]} bits and values in {widths[1]}, and ModelOpt has 8 and 8, 4 and "
            "4, 8 and 4, or 16 and 16: choose one of them."
        )
    return _WRITTEN[widths]


def _document(algos: dict[int, Algo]) -> dict[str, Any]:
    return {
        # Readers choose their parser by this name.
        "producer": {"name": "modelopt", "version": f"kvloom {__version__}"},
        "quantization": {
            "quant_algo": None,
            "quantized_layers": {},
            "kv_cache_quant_algo": _summary(set(algos.values())),
            "kv_cache_quantized_layers": {
                f"model.layers.{layer}.self_attn": {"quant_algo": algo} for layer, algo in algos.items()
            },
            "kv_cache_schema_version": 1,
        },
    }


register(ModelOpt())
