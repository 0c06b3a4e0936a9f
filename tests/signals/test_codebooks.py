"""Calibrated codebooks: the gradients behind them, what they gain, what the plan says, what is refused."""

from __future__ import annotations

import pytest
import torch

from kvloom.codecs import as_stored, split
from kvloom.errors import DataError, ModelError, PlanError
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, TensorSpec, Window
from kvloom.signals import calibrate_codebooks, compute_profile
from kvloom.signals._codebooks import _attention
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, tapped
from tests.signals.models import random_tokens, tiny

KEY = TensorSpec(codec="nuq", bits=3, grouping="per_channel", group_size=64)
VALUE = TensorSpec(codec="nuq", bits=2, grouping="per_token", group_size="head_dim")
PLAIN = TensorSpec(bits=4, grouping="per_token", group_size=16)


def plan_of(model, key=KEY, value=VALUE, window=None) -> Plan:
    fingerprint = Fingerprint.of(model)
    return Plan.from_specs(fingerprint, dict.fromkeys(fingerprint.packed_layers, (key, value)), window=window)


def even(spec: TensorSpec) -> TensorSpec:
    points = tuple(2 * i / (2**spec.bits - 1) - 1 for i in range(2**spec.bits))
    return spec.model_copy(update={"codebook": points})


def weighted_errors(model, plan, tokens) -> dict[tuple[int, int], float]:
    """Fisher-weighted squared error of the packed tokens, by layer and side; one prompt."""
    sinks = plan.layers[0].window.sinks
    packed = slice(sinks, sinks + (tokens.shape[1] - 1 - sinks) // 64 * 64)
    found = {}
    for layer, caught in _attention(model, plan.model, Prompts.of(model, tokens, None, 0)).items():
        specs = plan.spec(layer).key, plan.spec(layer).value
        states = (caught.key, caught.value)
        for side, (spec, x, slope) in enumerate(zip(specs, states, caught.state_gradients(), strict=True)):
            error = as_stored(x[:, :, packed], spec.format(plan.model.head_dim), 64) - x[:, :, packed]
            found[layer, side] = float((slope[:, :, packed] * error).double().square().sum())
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_gradients_are_those_of_the_loss(family: str) -> None:
    """Against a finite difference of the loss along the keys, or the values, of one layer."""
    model, tokens = tiny(family), random_tokens(1, 70)
    layer = Fingerprint.of(model).packed_layers[0]
    caught = _attention(model, Fingerprint.of(model), Prompts.of(model, tokens, None, 0))[layer]
    for side, slope in enumerate(caught.state_gradients()):
        direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(side))
        expected = float((slope * direction).sum())
        losses = [moved_loss(model, tokens, layer, side, step * direction) for step in (1e-3, -1e-3)]
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(expected, rel=2e-2, abs=2e-2)


def moved_loss(model, tokens, layer, side, change) -> float:
    """Summed over tokens, in nats, with ``change`` added to what one layer caches."""

    class Moving(Tap):
        def attend(self, index, query, key, value, scoring):
            if index == layer:
                key, value = key + change * (side == 0), value + change * (side == 1)
            return super().attend(index, query, key, value, scoring)

    with tapped(model, Moving([layer], Window(), 64)), torch.no_grad():
        logits = model(tokens, use_cache=False).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))


@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_codebooks_beat_uniform_ones_on_what_they_were_calibrated_on(rotation: str | None) -> None:
    model, tokens = tiny("llama"), random_tokens(1, 200)
    key, value = (spec.model_copy(update={"rotation": rotation}) for spec in (KEY, VALUE))
    plan = plan_of(model, key, value, Window(sinks=4))
    made = calibrate_codebooks(model, plan, tokens)
    if rotation is None:  # `as_stored` brings errors back before they are weighted
        ours, theirs = (
            weighted_errors(model, p, tokens) for p in (made, plan_of(model, even(key), even(value), Window(sinks=4)))
        )
        assert all(ours[unit] < theirs[unit] for unit in theirs)
    for layer in plan.model.packed_layers:
        for spec, bits in ((made.spec(layer).key, 3), (made.spec(layer).value, 2)):
            assert spec.codebook == tuple(sorted(spec.codebook))
            assert len(set(spec.codebook)) == 2**bits
            assert torch.tensor(spec.codebook).half().tolist() == list(spec.codebook)


def test_they_are_the_k_means_of_normalised_elements_by_hand() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 130)
    made = calibrate_codebooks(model, plan_of(model), tokens)
    caught = _attention(model, made.model, Prompts.of(model, tokens, None, 0))[1]
    x, slope = caught.value[:, :, :128], caught.state_gradients()[1][:, :, :128]
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    check_means((2 * x - high - low) / (high - low), ((high - low) / 2 * slope).square(), made.spec(1).value)


def test_keys_before_rope_are_calibrated_as_their_projection_gives_them() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 70)
    made = calibrate_codebooks(model, plan_of(model, KEY.model_copy(update={"pre_rope": True})), tokens)
    projected = []
    keep = model.get_decoder().layers[2].self_attn.k_proj.register_forward_hook(lambda *call: projected.append(call[2]))
    logits = model(tokens, use_cache=False).logits
    keep.remove()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
    (slope,) = torch.autograd.grad(loss, projected)
    x, slope = (it[0, :64].detach().view(64, 2, 16).transpose(0, 1) for it in (projected[0], slope))
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    check_means((2 * x - high - low) / (high - low), ((high - low) / 2 * slope).square(), made.spec(2).key)


def test_outliers_do_not_count() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 130)
    spec = VALUE.model_copy(update={"outliers": 0.05})
    made = calibrate_codebooks(model, plan_of(model, PLAIN, spec), tokens)
    caught = _attention(model, made.model, Prompts.of(model, tokens, None, 0))[1]
    pages, slope = (x[0, :, :128].unflatten(1, (2, 64)) for x in (caught.value, caught.state_gradients()[1]))
    dense, outliers = split(pages, spec.format(16), 48)  # 0.05 * 64 * 16, in whole 16 bytes
    kept = torch.ones(2, 2, 64 * 16).scatter(-1, outliers.index, 0.0).view_as(pages)
    low, high = dense.amin(-1, keepdim=True), dense.amax(-1, keepdim=True)
    unit, weight = (2 * dense - high - low) / (high - low), ((high - low) / 2 * slope).square()
    check_means(unit, weight * kept, made.spec(1).value)


def check_means(unit: torch.Tensor, weight: torch.Tensor, spec: TensorSpec) -> None:
    """Every point is the weighted mean of the elements nearest to it."""
    points = torch.tensor(spec.codebook)
    nearest = (unit[..., None] - points).abs().argmin(-1)
    for code, point in enumerate(points):
        own = nearest == code
        assert float((weight * unit)[own].sum() / weight[own].sum()) == pytest.approx(float(point), abs=5e-3)


def test_the_plan_says_what_was_read_and_keeps_the_rest() -> None:
    model, tokens, seen = tiny("llama"), random_tokens(2, 100), []
    fingerprint = Fingerprint.of(model)
    entries = (
        LayerPlan(layers="0-1", key=KEY, value=PLAIN, heads={1: HeadPlan(key=VALUE)}, window=Window(sinks=4)),
        LayerPlan(layers=2, key=PLAIN, value=PLAIN),
    )
    plan = Plan(model=fingerprint, layers=entries, prefill="quantized")
    made = calibrate_codebooks(model, plan, tokens, texts=["a"], progress=lambda *report: seen.append(report[:2]))
    assert [entry.layers for entry in made.layers] == [0, 1, 2]
    assert made.layers[2] == plan.layers[1]
    assert made.spec(0).key.codebook != made.spec(1).key.codebook
    assert len(made.spec(0).key.codebook) == 8
    assert len(made.spec(0).heads[1].key.codebook) == 4
    assert made.spec(0).value == PLAIN
    assert made.spec(0).window == Window(sinks=4)
    assert made.prefill == "quantized"
    record = made.provenance.calibration["codebooks"]
    assert (record["texts"], record["prompts"], record["tokens"]) == (["a"], 2, 100)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert made.nbytes(1, 100) == plan.nbytes(1, 100) == sum_without_codebooks(plan) + 2 * 2 * (8 + 4)
    again = calibrate_codebooks(model, made, tokens, texts=["a"])
    assert again == made  # deterministic, and old codebooks do not matter


def sum_without_codebooks(plan: Plan) -> int:
    """Bytes of the plan with the affine codec, whose parameters are as many."""
    return Plan.model_validate_json(plan.to_json().replace("nuq", "affine")).nbytes(1, 100)


def test_what_cannot_be_calibrated_is_refused() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 80)
    with pytest.raises(PlanError, match=r"needs no codebooks: .* codec 'nuq'"):
        calibrate_codebooks(model, plan_of(model, PLAIN, PLAIN), tokens)
    with pytest.raises(DataError, match="never fill a page of 64 tokens"):
        calibrate_codebooks(model, plan_of(model), tokens[:, :60])
    with pytest.raises(ModelError, match="the plan is for num_layers = 3"):
        calibrate_codebooks(tiny("llama", num_hidden_layers=2), plan_of(model), tokens)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(DataError, match="no gradient reaches the keys of layer 0"):
        calibrate_codebooks(model, plan_of(model), tokens)


def test_a_profile_has_no_candidates_without_a_codebook() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 80)
    model.forward = None  # nothing is read before the candidates are checked
    for specs in ({"key_specs": [PLAIN, KEY]}, {"value_specs": [VALUE]}):
        with pytest.raises(PlanError, match=r"^codec 'nuq' has a codebook for every layer, .* run kvloom calibrate"):
            compute_profile(model, tokens, **specs)


def test_a_candidate_with_a_codebook_is_measured() -> None:
    made = compute_profile(tiny("llama"), random_tokens(1, 80), value_specs=[even(VALUE), PLAIN])
    assert all(coarse > 0 for coarse, _ in made.table.value_loss)


def test_on_a_real_model_they_lose_less_than_uniform_grids_on_other_text(smollm2) -> None:
    from kvloom.assets import CALIBRATION, EVALUATION, texts, token_windows

    model, tokenizer = smollm2
    window = Window(sinks=4)
    plan = plan_of(model, window=window)
    made = calibrate_codebooks(model, plan, token_windows(tokenizer, texts(CALIBRATION), 256, 2, seed=0))
    other = token_windows(tokenizer, texts(EVALUATION), 256, 1, seed=0)
    ours = weighted_errors(model, made, other)
    theirs = weighted_errors(model, plan_of(model, even(KEY), even(VALUE), window), other)
    assert sum(ours.values()) < 0.8 * sum(theirs.values())
    assert sum(ours[unit] < theirs[unit] for unit in ours) > 0.8 * len(ours)
