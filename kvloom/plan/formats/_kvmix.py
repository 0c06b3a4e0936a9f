"""KVmix (arXiv 2506.08018, LfLab-AI/KVmix): bits and a share of exact tokens a layer, keys and values apart.

KVmix has no file: its profiler hands a dict on in memory (`set_quant_bits`). That dict is read here, alone or as
``quant_bits`` of a document that says the rest.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import LayerPlan, TensorSpec, Window, format_layers
from kvloom.plan._validate import validated
from kvloom.plan.formats._axes import group_size_of
from kvloom.plan.formats._base import Document, PlanFormat, register
from kvloom.plan.formats._deviations import Deviations
from kvloom.plan.formats._document import is_table
from kvloom.plan.formats._layers import packed_rows, plan_of

Bits = Literal[1, 2, 3, 4]
Ratio = float

RATIOS: dict[str, dict[int, Ratio]] = {
    "paper": {2: 0.1, 3: 0.2, 4: 0.2},
    "repository": {1: 0.1, 2: 0.2, 3: 0.2, 4: 0.3},
}
"""Share of exact tokens by bits: the paper's, and that of `set_quant_bits` in the repository."""

_WORD_CODES: Literal[11] = 11
"""Codes in a 32-bit word of KVmix's 3 bits, which is also their group (`quantization_cuda.cu`)."""


class Layer(Document):
    """One layer's entry."""

    k_bits: Bits
    v_bits: Bits
    k_residual_ratio: Ratio | None = Field(default=None, ge=0, lt=1)
    v_residual_ratio: Ratio | None = Field(default=None, ge=0, lt=1)


class Config(Document):
    """What KVmix's attention reads, and what a file must say beside it.

    Attributes:
        quant_bits: Layer -> entry; a list counts layers from 0.
        group_size: Tokens of a key group, channels of a value group (32 in its scripts).
        rpc: What the ratios are a share of: ``residual``, the exact tokens of the moment, as paper and repository have
            it; ``context``, all tokens, as in its Mistral flash attention.
        ratios: Whose shares hold where an entry gives none.
    """

    quant_bits: dict[int, Layer]
    group_size: int = Field(default=32, gt=0)
    rpc: Literal["residual", "context"] = "residual"
    ratios: Literal["paper", "repository"] | None = None


class KVmix(PlanFormat):
    """KVmix's per-layer bits and RPC ratios."""

    name = "kvmix"

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        config = validated(Config, _whole(document), self.name)
        rows = packed_rows(config.quant_bits, model, "quant_bits")
        _three_bits(rows, config, deviations)
        windows = {layer: _window(layer, row, config, deviations) for layer, row in rows.items()}
        return plan_of(model, [_entry(layer, row, config, model, windows[layer]) for layer, row in rows.items()])


def _whole(document: Any) -> Any:
    """A document of all fields from any of the forms."""
    if is_table(document) or isinstance(document, list):
        document = {"quant_bits": document}
    if isinstance(document, dict) and isinstance(document.get("quant_bits"), list):
        document = {**document, "quant_bits": dict(enumerate(document["quant_bits"]))}
    return document


def _entry(layer: int, row: Layer, config: Config, model: Fingerprint, window: Window) -> LayerPlan:
    size = config.group_size
    return LayerPlan(
        layers=layer,
        key=_key(row.k_bits, size, model),
        value=TensorSpec(
            bits=row.v_bits,
            grouping="per_token",
            group_size=group_size_of(size, "per_token", model, "group_size"),
        ),
        window=window,
    )


def _key(bits: Bits, size: int, model: Fingerprint) -> TensorSpec:
    if bits == 3:
        return TensorSpec(codec="kvmix3", bits=3, grouping="per_channel", group_size=_WORD_CODES)
    return TensorSpec(
        bits=bits, grouping="per_channel", group_size=group_size_of(size, "per_channel", model, "group_size")
    )


def _three_bits(rows: dict[int, Layer], config: Config, deviations: Deviations) -> None:
    if keys := [layer for layer, row in rows.items() if row.k_bits == 3]:
        deviations.note(
            f"3-bit keys in layers {format_layers(keys)} are groups of eleven tokens that start anew on every page: "
            "6.0 true bits, where KVmix's words take 5.8"
        )
    if values := [layer for layer, row in rows.items() if row.v_bits == 3]:
        deviations.instead(
            f"3-bit values in layers {format_layers(values)} are groups of eleven channels, which KVmix cannot run "
            "unless head_dim is a multiple of eleven",
            f"3-bit groups of {config.group_size}",
        )


def _window(layer: int, row: Layer, config: Config, deviations: Deviations) -> Window:
    """The layer's window; one serves keys and values."""
    key = _kept(layer, "k", row.k_bits, row.k_residual_ratio, config)
    value = _kept(layer, "v", row.v_bits, row.v_residual_ratio, config)
    kept = max(key, value)
    if key != value:
        deviations.instead(
            f"quant_bits.{layer} keeps {key:g} for keys and {value:g} for values ({_UNITS[config.rpc]}), and a layer's "
            "keys and values share one window",
            f"{kept:g} for both",
        )
    if config.rpc == "context":
        return Window(recent_ratio=kept)
    deviations.note(
        "rpc residual: KVmix keeps a share of the prompt at first, which shrinks within a few steps to a cycle of a "
        "few tens of tokens; the plan keeps the fewest of that cycle from the start"
    )
    return Window(recent=int(kept))


_UNITS = {"residual": "tokens, in its steady state", "context": "of all tokens"}


def _kept(layer: int, side: str, bits: int, ratio: Ratio | None, config: Config) -> float:
    """Share of all tokens, or tokens in the steady state, that one side keeps exact."""
    ratio = _default_ratio(layer, side, bits, config) if ratio is None else ratio
    if config.rpc == "context":
        return ratio
    group = _WORD_CODES if (side, bits) == ("k", 3) else config.group_size
    return steady_recent(ratio, group)


def _default_ratio(layer: int, side: str, bits: int, config: Config) -> Ratio:
    ratio = RATIOS.get(config.ratios or "", {}).get(bits)
    if ratio is None:
        raise PlanError(
            f"quant_bits.{layer} has {side}_bits {bits} and no {side}_residual_ratio: give it, or set ratios to paper "
            "(2, 3 and 4 bits) or repository."
        )
    return ratio


def steady_recent(ratio: Ratio, group: int) -> int:
    """Fewest exact tokens that KVmix's rule ever leaves while decoding.

    At ``F`` exact tokens it quantises whole groups of the ``F - floor(ratio F)`` oldest. While that is less than a
    group, F grows by one a step; at the first F where it is a group, ``floor(ratio F)`` remain
    (`models/modeling_llama_KVmix.py`).

    Args:
        ratio: Share of the exact tokens to keep, below 1.
        group: Tokens quantised together.
    """
    exact = group
    while exact - math.floor(ratio * exact) < group:
        exact += 1
    return math.floor(ratio * exact)


register(KVmix())
