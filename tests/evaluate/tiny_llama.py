"""Tiny random models and token windows for the evaluation tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def tiny_model(seed: int = 0, kv_heads: int = 2) -> LlamaForCausalLM:
    """Two Llama layers of 4 heads of 32 channels; weights large enough that attention is uneven."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def random_windows(count: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """int64 ids `[count, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count, tokens), generator=generator)


class Letters:
    """A tokenizer of one token a character, with the parts that the evaluation uses."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [ord(letter) % VOCABULARY for letter in text]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(32 + token) for token in ids)

    def text(self, decoded):
        """A text whose tokens decode to this."""
        return "".join(chr(ord(letter) - 32 + VOCABULARY) for letter in decoded)
