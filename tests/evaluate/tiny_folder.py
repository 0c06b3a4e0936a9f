"""A tiny random model that reads the packaged model's tokens, as a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvloom.assets import model_dir


def save_tiny(folder: Path, layers: int = 2) -> LlamaForCausalLM:
    """Write the model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir()))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
