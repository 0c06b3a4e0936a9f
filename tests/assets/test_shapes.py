from __future__ import annotations

import pytest
import torch

from kvloom.assets import SHAPES, random_model, shape_config
from kvloom.errors import ModelError

META = torch.device("meta")


@pytest.mark.parametrize(("name", "parameters"), [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248)])
def test_shapes_have_as_many_parameters_as_published(name: str, parameters: int):
    model = random_model(name, dtype=torch.bfloat16, device=META)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.name_or_path == name
    assert not model.training


def test_a_random_model_runs_where_it_was_made(monkeypatch: pytest.MonkeyPatch):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    monkeypatch.setitem(SHAPES, "tiny", {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
    model = random_model("tiny", dtype=torch.float32, device=torch.device("cpu"))
    again = random_model("tiny", dtype=torch.float32, device=torch.device("cpu"))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 50)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(ModelError, match=r"shape 'llama-4' is unknown; choose one of llama-2-7b, llama-3\.1-8b"):
        shape_config("llama-4")
