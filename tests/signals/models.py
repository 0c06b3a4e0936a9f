"""Tiny random models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 61
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # sharp enough that attention is not uniform
}
_FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"hidden_size": 64}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 20, "attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 20, "sliding_window_pattern": 2}),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of the family, in evaluation mode."""
    config, model, own = _FAMILIES[family]
    torch.manual_seed(0)
    made: PreTrainedModel = model(config(**{**_SHAPE, **own, **changes})).eval()
    return made


def falcon() -> PreTrainedModel:
    """A model that does not use the attention interface."""
    return FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    ).eval()


def random_tokens(prompts: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (prompts, tokens), generator=torch.Generator().manual_seed(1))
