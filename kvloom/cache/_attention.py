"""The registered attention and mask, and the one explicit door: `enable`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvloom import kernels
from kvloom._processes import world_size
from kvloom.cache._autocast import without_autocast
from kvloom.cache._invariant import fix_rows, free_rows
from kvloom.cache._kept_kv import KeptKV
from kvloom.cache._ring_kv import RingKV
from kvloom.errors import ModelError
from kvloom.pages import PagedKV, StaticKV

ATTENTION = "kvloom"
INVARIANT = "kvloom-invariant"
_REGISTRY_WORD = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True)
class _Way:
    """How attention is computed: over plain tensors, over a layer's cache, and what turns queries and outputs."""

    dense: Callable[..., torch.Tensor]
    paged: Callable[..., torch.Tensor]
    turned: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _fused(query: torch.Tensor, kv: PagedKV | StaticKV, **options: Any) -> torch.Tensor:
    if isinstance(kv, StaticKV):
        return kernels.attend_static(query, kv, **options)
    return kernels.backend(kv.device).attend(query, kv, **options)


def _invariant(query: torch.Tensor, kv: PagedKV | StaticKV, **options: Any) -> torch.Tensor:
    if isinstance(kv, StaticKV):
        raise ModelError("batch_invariant attention reads growing caches: make the LoomCache without max_tokens.")
    return kernels.INVARIANT.attend(query, kv, **options)


def _turned_in_fp64(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return kernels.turned(x.double(), matrix.double()).to(x.dtype)


_FUSED = _Way(kernels.dense_attention, _fused, kernels.turned)
_INVARIANT = _Way(kernels.invariant_attention, _invariant, _turned_in_fp64)


def loom_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedKV | StaticKV | RingKV,
    value: torch.Tensor | PagedKV | StaticKV | RingKV,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    way: _Way = _FUSED,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention, over packed or plain keys and values.

    Args:
        module: The attention module.
        query: ``[batch, query_heads, queries, head_dim]``.
        key: A layer's `PagedKV`, `StaticKV` or `RingKV`, or a tensor ``[batch, kv_heads, tokens, head_dim]``.
        value: Likewise.
        attention_mask: 4-D, boolean or additive, or None for causal (in layers that are); with no columns it hides
            nothing, and keeps transformers from making one.
        dropout: Must be 0; packed caches are for inference.
        scaling: Factor of the scores; ``head_dim ** -0.5`` if None.
        softcap: Soft cap of the scores (Gemma 2).
        s_aux: Sink logits ``[query_heads]`` (gpt-oss).
        way: How it is computed.
        **kwargs: What other attention functions want. ``is_causal=False`` without a mask is for plain tensors, or one
            query.

    Returns:
        ``[batch, queries, query_heads, head_dim]`` and None: weights are never materialised.
    """
    if dropout:
        raise ModelError("kvloom attention has no dropout: call model.eval(), or kvloom.disable(model) to train.")
    said = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if said is None else said
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {
        "scaling": scale,
        "mask": attention_mask if attention_mask is None or attention_mask.shape[-1] else None,
        "softcap": softcap,
        "sink_logits": s_aux,
    }
    if isinstance(key, PagedKV | StaticKV):
        if not is_causal and attention_mask is None and query.shape[2] > 1:
            raise ModelError(
                "pages are read causally and this layer is not causal: call kvloom.disable(model) for this model."
            )
        return _attend(query, key, way, options), None
    if isinstance(key, RingKV):
        return way.dense(query, key.key, key.value, **{**options, "mask": key.mask_of(options["mask"])}), None
    if not isinstance(value, torch.Tensor):
        raise ModelError("a layer mixed packed values with plain keys; kvloom cannot serve this model.")
    return way.dense(query, key, value, is_causal=is_causal, **options), None


def _attend(query: torch.Tensor, kv: PagedKV | StaticKV, way: _Way, options: dict[str, Any]) -> torch.Tensor:
    if not isinstance(kv, KeptKV):
        return _read(query, kv, way, options)
    out = _read(query, kv, way, {**options, "mask": kv.mask_of(options["mask"])})
    with without_autocast(query.device):
        kv.observe(query, **options)
    return out


def _read(query: torch.Tensor, kv: PagedKV | StaticKV, way: _Way, options: dict[str, Any]) -> torch.Tensor:
    if isinstance(kv, PagedKV) and kv.own is not None:
        return way.dense(query, kv.own.key, kv.own.value, **options)
    with without_autocast(query.device):
        if isinstance(kv, StaticKV):  # kernels turn there
            return way.paged(query, kv, **options)
        asked = query if kv.query_turn is None else way.turned(query, kv.query_turn)
        out = way.paged(asked, kv, **options)
        return out if kv.output_turn is None else way.turned(out.transpose(1, 2), kv.output_turn).transpose(1, 2)


def invariant_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """`loom_attention` whose result for a query does not depend on what else is in the pass."""
    return loom_attention(*args, **{**kwargs, "way": _INVARIANT})


def reads_pages(implementation: str | None) -> bool:
    """Whether a model's attention of this name is one of kvloom's."""
    return implementation in _REGISTERED


_REGISTERED = {ATTENTION: loom_attention, INVARIANT: invariant_attention}


def enable(model: Any, *, batch_invariant: bool = False) -> None:
    """Let a transformers model's attention read packed pages (and plain tensors, as sdpa does).

    Args:
        model: Model.
        batch_invariant: Make the result for a token independent of the length of its pass and of the other sequences,
            bit for bit: linear layers take rows in blocks of one shape and attention sums in fp64. With
            ``prefill="quantized"`` a model then gives the same tokens however its prompt arrives. Slower; for caches
            that grow, and models in one process whose products are linear layers and attention (not for fused
            experts).

    Raises:
        ModelError: The model does not take its attention from transformers' registry, so it can only use the dense way;
            or it is sharded, and ``batch_invariant`` is asked for.
    """
    source = _modeling_source(model)
    if _REGISTRY_WORD not in source:
        raise ModelError(
            f"{type(model).__name__} computes attention itself instead of through transformers' registry: use "
            "LoomCache without enable (memory is saved, speed is not)."
        )
    if batch_invariant and world_size(model) > 1:
        raise ModelError(
            "batch_invariant cannot fix the order in which processes of a sharded model sum up: leave it out, or use "
            "one process."
        )
    for name, function in _REGISTERED.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    current = model.config._attn_implementation
    if not reads_pages(current):
        model._kvloom_previous_attention = current
    model.set_attn_implementation(INVARIANT if batch_invariant else ATTENTION)
    (fix_rows if batch_invariant else free_rows)(model)


def disable(model: Any) -> None:
    """Undo `enable`: give the model back the attention it had, unless it has been given another since."""
    free_rows(model)
    previous = getattr(model, "_kvloom_previous_attention", None)
    if previous is None:
        return
    if reads_pages(model.config._attn_implementation):
        model.set_attn_implementation(previous)
    del model._kvloom_previous_attention


def _modeling_source(model: Any) -> str:
    """Source of the module that defines the model's decoder, which may lie within others that see, hear or adapt."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    module = sys.modules[type(decoder).__module__]
    try:
        return inspect.getsource(module)
    except OSError:
        return ""
