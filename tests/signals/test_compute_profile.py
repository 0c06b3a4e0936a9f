"""The profile as a whole: what it records, what it leaves behind, what it refuses."""

from __future__ import annotations

import hashlib

import pytest
import torch

from kvloom.errors import DataError, ModelError, PlanError
from kvloom.plan import Fingerprint, TensorSpec, Window
from kvloom.signals import Evidence, LayerSignal, Profile, compute_profile, register
from tests.signals.models import falcon, random_tokens, tiny

SPECS = {
    "key_specs": [TensorSpec(bits=2, grouping="per_channel", group_size=64)],
    "value_specs": [TensorSpec(bits=2, grouping="per_token", group_size="head_dim")],
}


def test_the_profile_says_what_was_measured(tmp_path) -> None:
    model, tokens = tiny("gemma3"), random_tokens(3, 80)
    seen = []
    profile = compute_profile(
        model, tokens, batch=2, texts=["a", "b"], seed=5, progress=lambda *report: seen.append(report[:2]), **SPECS
    )
    assert profile.model == Fingerprint.of(model)
    assert profile.table.layers == list(profile.model.packed_layers) == [1]
    assert profile.table.signal == "error_gradient"
    assert profile.calibration.model_dump() == {
        "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "texts": ["a", "b"],
        "prompts": 3,
        "tokens": 80,
        "seed": 5,
    }
    assert profile.seconds > 0
    assert seen == [(0, 3), (2, 3), (3, 3)]
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = tiny(family)
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    training = [module.training for module in model.modules()]
    compute_profile(model, random_tokens(1, 80), **SPECS)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert [module.training for module in model.modules()] == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "eager"


def test_no_gradient_context_of_the_caller_matters() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 80)
    plain = compute_profile(model, tokens, **SPECS)
    with torch.inference_mode():
        inferred = compute_profile(model, tokens, **SPECS)
    assert inferred.table == plain.table
    assert inferred.gradient == plain.gradient


def test_bfloat16_agrees_with_float32() -> None:
    model, tokens = tiny("llama"), random_tokens(4, 120)
    exact = compute_profile(model, tokens, **SPECS, labels="true")
    half = compute_profile(model.to(torch.bfloat16), tokens, **SPECS, labels="true")
    assert half.model.dtype == "bfloat16"
    assert half.gradient.key == pytest.approx(exact.gradient.key, rel=0.1)
    assert half.gradient.value == pytest.approx(exact.gradient.value, rel=0.1)


def test_any_registered_signal_can_predict() -> None:
    class ErrorEnergy(LayerSignal):
        name = "test_error_energy"

        def score(self, evidence: Evidence) -> torch.Tensor:
            return torch.full((len(evidence.scored), 1, len(evidence.formats)), 0.5 + (evidence.side == "key"))

    register(ErrorEnergy())
    table = compute_profile(tiny("llama"), random_tokens(1, 80), signal="test_error_energy", **SPECS).table
    assert table.signal == "test_error_energy"
    assert (table.key_loss[0], table.value_loss[0]) == ([1.5], [0.5])
    with pytest.raises(ValueError, match="taken"):
        register(ErrorEnergy())


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((1, 5, 1), ValueError, r"scores the keys of 3 layers as \[1, 3, 5, 1\]: give \[1 prompts, 2 heads or 1"),
        ((1, 1), ValueError, "scores the keys"),
        ((1, 1, 2), ValueError, "1 formats"),
        ((1, 1, 1), DataError, "gives no finite number for the keys of layer 1"),
    ],
)
def test_a_wrong_signal_is_told_what_is_wrong(shape, error, message, tmp_path) -> None:
    class Wrong(LayerSignal):
        name = f"test_wrong_{'_'.join(map(str, shape))}"

        def score(self, evidence: Evidence) -> torch.Tensor:
            return torch.full(shape, torch.nan if evidence.layer == 1 else 1.0)

    register(Wrong())
    out = tmp_path / "profile.json"
    with pytest.raises(error, match=message):
        compute_profile(tiny("llama"), random_tokens(1, 80), signal=Wrong.name, out=out, **SPECS)
    assert not list(tmp_path.iterdir())  # nothing wrong is kept for the next run


def test_bad_data_is_refused_in_a_sentence() -> None:
    model, tokens = tiny("llama"), random_tokens(2, 80)
    with pytest.raises(DataError, match="prompt 0 has fewer than two tokens"):
        compute_profile(model, tokens[:, :1])
    with pytest.raises(DataError, match="prompt 1 has fewer than two tokens"):
        compute_profile(model, tokens, attention_mask=torch.tensor([[1] * 80, [0] * 79 + [1]]))
    with pytest.raises(DataError, match="attention_mask"):
        compute_profile(model, tokens, attention_mask=torch.ones(2, 79))
    with pytest.raises(DataError, match="tokens must be"):
        compute_profile(model, tokens[0])
    with pytest.raises(DataError, match="never fill a page of 64 tokens"):
        compute_profile(model, tokens, window=Window(recent=40))
    with pytest.raises(DataError, match=r"go from \d+ to 61, .* vocabulary has 61 \(0 to 60\): use the model's own"):
        compute_profile(model, random_tokens(1, 80).index_fill(1, torch.tensor([3]), 61))
    with pytest.raises(DataError, match="go from -1 to "):
        compute_profile(model, random_tokens(1, 80).index_fill(1, torch.tensor([3]), -1), signal="weight_frobenius")
    with pytest.raises(DataError, match="batch is 0"):
        compute_profile(model, tokens, batch=0)
    with pytest.raises(PlanError, match=r"signal 'magic' is unknown; choose one of|docs/signals.md lists all"):
        compute_profile(model, tokens, signal="magic")


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        compute_profile(model, random_tokens(1, 80), **SPECS)


def test_a_model_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ModelError, match="layer 0"):
        compute_profile(falcon(), random_tokens(1, 80), **SPECS)


def test_a_format_that_does_not_fit_is_refused() -> None:
    values = [TensorSpec(bits=2, grouping="per_token", group_size=64)]
    with pytest.raises(PlanError, match="group_size 64 does not divide head_dim 16"):
        compute_profile(tiny("llama"), random_tokens(1, 80), value_specs=values)
