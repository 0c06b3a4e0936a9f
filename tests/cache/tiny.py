"""Tiny random models, plans and ways to run tokens, shared by the cache tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import DynamicCache

from kvloom.cache import LoomCache, enable
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, TensorSpec, Window

VOCABULARY = 97
SLIDING = 24
PASSTHROUGH = TensorSpec(bits=16, grouping="per_token")

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": SLIDING,
            "layer_types": _ALTERNATING,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": SLIDING,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": SLIDING,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": SLIDING,
            "layer_types": _ALTERNATING,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
    ),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi3": ("Phi3", {"sliding_window": None}),
}


def build(name: str, **changes: Any) -> Any:
    """A random model of a family of `FAMILIES`, in float32, ready for inference."""
    family, fields = FAMILIES[name]
    return make(family, **{**fields, **changes})


def make(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """A random ``<family>ForCausalLM`` with the given config fields over tiny defaults."""
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    config = getattr(transformers, family + suffix)(**{**_BASE, **fields})
    torch.manual_seed(seed)
    model = getattr(transformers, family + "ForCausalLM")(config)
    _shake(model)
    model.set_attn_implementation("eager")
    return model.eval()


def exact(family: str) -> Any:
    """`build` in float64, enabled: masks that are made in two ways, and sums in two orders, flip no code."""
    model = build(family).double()
    model.set_experts_implementation("eager")  # others have no float64
    return enabled(model)


def _shake(model: Any) -> None:
    """Random sinks, norms and biases too: ones and zeros would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def prompt(tokens: int, *, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids ``[batch, tokens]`` without the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=generator)


def passthrough(model: Any, **options: Any) -> Plan:
    """16 bits everywhere: the packed path, nothing rounded."""
    fingerprint = Fingerprint.of(model)
    specs = dict.fromkeys(fingerprint.packed_layers, (PASSTHROUGH, PASSTHROUGH))
    return Plan.from_specs(fingerprint, specs, **options)


def eight_bit(model: Any, **options: Any) -> Plan:
    """8-bit keys per channel and values per token."""
    return Plan.uniform(model, key_bits=8, value_bits=8, **options)


def mixed(model: Any, **options: Any) -> Plan:
    """4-bit keys and 2-bit values; KV head 1 apart, with rotated 3-bit keys and 5-bit values."""
    window = options.pop("window", Window())
    fingerprint = Fingerprint.of(model)
    apart = HeadPlan(
        key=TensorSpec(bits=3, grouping="per_channel", group_size=32, rotation="hadamard"),
        value=TensorSpec(bits=5, grouping="per_token", group_size="head_dim", symmetric=True),
    )
    entry = LayerPlan(
        layers=",".join(map(str, fingerprint.packed_layers)),
        key=TensorSpec(bits=4, grouping="per_channel", group_size=64),
        value=TensorSpec(bits=2, grouping="per_token", group_size=16),
        window=window,
        heads={1: apart},
    )
    return Plan(model=fingerprint, layers=(entry,), **options)


@torch.no_grad()
def run(model: Any, cache: Any, tokens: torch.Tensor, chunks: list[int], **inputs: Any) -> torch.Tensor:
    """Logits ``[batch, tokens, vocabulary]`` of ``tokens`` fed in the given chunks."""
    pieces = torch.split(tokens, chunks, dim=1)
    return torch.cat([model(p, past_key_values=cache, **inputs).logits for p in pieces], dim=1)


def enabled(model: Any) -> Any:
    """The model, with attention that reads pages."""
    enable(model)
    return model


def dense(model: Any) -> DynamicCache:
    """The model's own cache."""
    return DynamicCache(config=model.config)


def steps(total: int, first: int) -> list[int]:
    """A prompt of ``first`` tokens, then one token at a time."""
    return [first] + [1] * (total - first)


def greedy(model: Any, inputs: torch.Tensor, cache: Any, new: int = 24, **options: Any) -> torch.Tensor:
    """Tokens of ``generate`` without sampling, the prompt included."""
    return model.generate(
        inputs,
        past_key_values=cache,
        max_new_tokens=new,
        **{"do_sample": False, "attention_mask": torch.ones_like(inputs), **options},
    )


def codes(cache: LoomCache) -> list[torch.Tensor]:
    """Page records of every packed layer."""
    return [group.data for layer in cache.packed_layers.values() for group in layer.pages]
