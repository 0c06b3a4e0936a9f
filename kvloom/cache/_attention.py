"""The registered attention and mask, and the one explicit door: `enable`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvloom import kernels
from kvloom.cache._rotation import turned
from kvloom.errors import ModelError
from kvloom.pages import PagedKV, StaticKV

ATTENTION = "kvloom"
_REGISTRY_WORD = "ALL_ATTENTION_FUNCTIONS"


def loom_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedKV | StaticKV,
    value: torch.Tensor | PagedKV | StaticKV,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention, over packed or plain keys and values.

    Args:
        module: The attention module.
        query: ``[batch, query_heads, queries, head_dim]``.
        key: A layer's `PagedKV` or `StaticKV`, or a tensor ``[batch, kv_heads, tokens, head_dim]``.
        value: Likewise.
        attention_mask: 4-D, boolean or additive, or None for causal.
        dropout: Must be 0; packed caches are for inference.
        scaling: Factor of the scores; ``head_dim ** -0.5`` if None.
        softcap: Soft cap of the scores (Gemma 2).
        s_aux: Sink logits ``[query_heads]`` (gpt-oss).
        **kwargs: What other attention functions want; ``is_causal=False`` without a mask is refused.

    Returns:
        ``[batch, queries, query_heads, head_dim]`` and None: weights are never materialised.
    """
    if dropout:
        raise ModelError("kvloom attention has no dropout: call model.eval(), or kvloom.disable(model) to train.")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) and attention_mask is None:
        raise ModelError("kvloom attention is causal and this layer is not: call kvloom.disable(model) for this model.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {
        "scaling": scale,
        "mask": attention_mask,
        "softcap": softcap,
        "sink_logits": s_aux,
    }
    if isinstance(key, PagedKV | StaticKV):
        return _attend(query, key, options), None
    if not isinstance(value, torch.Tensor):
        raise ModelError("a layer mixed packed values with plain keys; kvloom cannot serve this model.")
    return kernels.dense_attention(query, key, value, **options), None


def _attend(query: torch.Tensor, kv: PagedKV | StaticKV, options: dict[str, Any]) -> torch.Tensor:
    if kv.query_turn is not None:
        query = turned(query, kv.query_turn)
    if isinstance(kv, StaticKV):
        out = kernels.attend_static(query, kv, **options)
    else:
        out = kernels.backend(kv.device).attend(query, kv, **options)
    return out if kv.output_turn is None else turned(out.transpose(1, 2), kv.output_turn).transpose(1, 2)


def enable(model: Any) -> None:
    """Let a transformers model's attention read packed pages (and plain tensors, as sdpa does).

    Raises:
        ModelError: The model does not take its attention from transformers' registry, so it can only use the dense way.
    """
    source = _modeling_source(model)
    if _REGISTRY_WORD not in source:
        raise ModelError(
            f"{type(model).__name__} computes attention itself instead of through transformers' registry: use "
            "LoomCache without enable (memory is saved, speed is not)."
        )
    AttentionInterface.register(ATTENTION, loom_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    current = model.config._attn_implementation
    if current != ATTENTION:
        model.set_attn_implementation(ATTENTION)
        model._kvloom_previous_attention = current


def disable(model: Any) -> None:
    """Undo `enable`: give the model back the attention it had, unless it has been given another since."""
    previous = getattr(model, "_kvloom_previous_attention", None)
    if previous is None:
        return
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation(previous)
    del model._kvloom_previous_attention


def _modeling_source(model: Any) -> str:
    """Source of the module that defines the model's class."""
    module = sys.modules[type(model).__module__]
    try:
        return inspect.getsource(module)
    except OSError:
        return ""
