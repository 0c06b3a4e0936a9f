"""KVmix's signal equals the norm of plain `loss.backward()` gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kvloom.errors import ModelError
from kvloom.plan import TensorSpec
from kvloom.signals import Profile, compute_profile
from kvloom.signals._projections import find_projections
from tests.signals.models import random_tokens, tiny

SPECS = {
    "key_specs": [TensorSpec(bits=4, grouping="per_channel", group_size=64)],
    "value_specs": [TensorSpec(bits=4, grouping="per_token", group_size="head_dim")],
}


def _profile(model, tokens, **arguments) -> Profile:
    return compute_profile(model, tokens, **SPECS, **arguments)


def _reference(model, layer, prompt) -> tuple[float, float]:
    """Norms of the gradients of transformers' own loss, on one prompt without padding."""
    model.zero_grad()
    model(prompt[None], labels=prompt[None]).loss.backward()
    attention = model.model.layers[layer].self_attn
    if hasattr(attention, "qkv_proj"):
        _, key, value = attention.qkv_proj.weight.grad.split([64, 32, 32])
    else:
        key, value = attention.k_proj.weight.grad, attention.v_proj.weight.grad
    return key.norm().item(), value.norm().item()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_norms_equal_those_of_backward(family: str) -> None:
    model, tokens = tiny(family), random_tokens(3, 80)
    profile = _profile(model, tokens, batch=2)
    for row, layer in enumerate(profile.table.layers):
        norms = torch.tensor([_reference(model, layer, prompt) for prompt in tokens])
        mean, spread = norms.mean(0), norms.std(0, correction=0)
        assert profile.gradient.key[row] == pytest.approx(mean[0].item(), rel=1e-4)
        assert profile.gradient.value[row] == pytest.approx(mean[1].item(), rel=1e-4)
        assert profile.gradient.key_spread[row] == pytest.approx(spread[0].item(), rel=1e-3)
        assert profile.gradient.value_spread[row] == pytest.approx(spread[1].item(), rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model, tokens = tiny("llama"), random_tokens(1, 90)
    pads = torch.zeros(1, 30, dtype=torch.long)
    parts = [pads, tokens] if side == "left" else [tokens, pads]
    mask = torch.cat([(part is tokens) * torch.ones_like(part) for part in parts], dim=1)
    plain = _profile(model, tokens)
    padded = _profile(model, torch.cat(parts, dim=1), attention_mask=mask)
    assert padded.gradient.key == pytest.approx(plain.gradient.key, rel=1e-4)
    assert padded.gradient.value == pytest.approx(plain.gradient.value, rel=1e-4)


def test_labels_are_shifted_once() -> None:
    """Token t is trained to predict t+1: with KVmix's double shift the norms would be the second reference."""
    model, tokens = tiny("llama"), random_tokens(1, 80)

    def norm(shift: int) -> float:
        model.zero_grad()
        logits = model(tokens).logits[0]
        cross_entropy(logits[:-shift], tokens[0, shift:]).backward()
        return model.model.layers[1].self_attn.v_proj.weight.grad.norm().item()

    once, twice = norm(1), norm(2)
    assert abs(once - twice) > 0.01 * once
    assert _profile(model, tokens).gradient.value[1] == pytest.approx(once, rel=1e-4)


def test_projections_that_cannot_be_told_are_named() -> None:
    class Mystery(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_idx = 0
            self.query_key_value = nn.Linear(16, 48)

    with pytest.raises(ModelError, match=r"layer 0 \(attn\) has neither k_proj"):
        find_projections(nn.ModuleDict({"attn": Mystery()}), [0], 16)
