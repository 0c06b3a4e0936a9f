from __future__ import annotations

import pytest
import torch

from kvloom.assets import SHAPES, random_model
from kvloom.bench import _ceilings as ceilings
from kvloom.bench import _timing as timing

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    """A model of two layers with random weights in float32."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return random_model("tiny", dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ceilings, over fewer samples and bytes."""
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setitem(ceilings._READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(ceilings._MATRIX, "cpu", 64)
