"""Shapes of public models, for measuring speed and memory with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvloom._names import unknown
from kvloom.assets._sharding import random_sharded, shared_device, started_processes
from kvloom.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_SEED = 0
_LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
"""Fields of `LlamaConfig`, from the models' cards. The 3.1 series' scaled frequencies cost what plain ones do."""


def shape_config(name: str) -> PreTrainedConfig:
    """The configuration of a shape, named after it.

    Args:
        name: a key of `SHAPES`.

    Raises:
        ModelError: there is no such shape.
    """
    from transformers import LlamaConfig

    if name not in SHAPES:
        raise ModelError(unknown("shape", name, SHAPES))
    config: PreTrainedConfig = LlamaConfig(
        **SHAPES[name], architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=None
    )
    config.name_or_path = name
    return config


def random_model(name: str, *, dtype: torch.dtype, device: torch.device, sharded: bool = False) -> PreTrainedModel:
    """A model of a shape with random weights, the same every time, made on its device, in evaluation mode.

    Args:
        name: a key of `SHAPES`.
        dtype: of the weights.
        device: where they are made; with ``meta`` they have sizes only.
        sharded: each process that torchrun has started makes a part, on its own device, as `load_model` does.

    Raises:
        ModelError: there is no such shape, or processes take another kind of device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = shape_config(name)
    if sharded and started_processes() > 1:
        shared_device(device.type)
        torch.manual_seed(_SEED)
        return random_sharded(config, dtype)
    used = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=used), torch.device(device):
        torch.manual_seed(_SEED)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    made: PreTrainedModel = model.eval()
    return made
