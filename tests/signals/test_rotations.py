"""Calibrated rotations of a model: what queries and outputs notice of rounding gets less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvloom import codecs
from kvloom.errors import DataError, ModelError, PlanError
from kvloom.pages import PAGE_TOKENS, Format
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, TensorSpec, Window
from kvloom.signals import calibrate_rotations, compute_profile
from kvloom.signals._rotations import output_moment, state_covariance
from kvloom.signals._tap import Tap, tapped
from tests.signals.models import falcon, random_tokens, tiny

FAMILIES = ["llama", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss"]
PER_CHANNEL = TensorSpec(bits=2, grouping="per_channel", group_size=32)
PER_TOKEN = TensorSpec(bits=2, grouping="per_token", group_size="head_dim")


def uniform(model, **options) -> Plan:
    return Plan.uniform(model, 2, 2, **{"value_group_size": 16, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated(family: str) -> None:
    model = tiny(family)
    before = model.config._attn_implementation
    seen: list[tuple[int, int]] = []
    plan = calibrate_rotations(
        model,
        uniform(model, window=Window(sinks=4)),
        random_tokens(2, 100),
        texts=["a"],
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert model.config._attn_implementation == before
    assert (
        {entry.key.rotation for entry in plan.layers}
        == {entry.value.rotation for entry in plan.layers}
        == {"calibrated"}
    )
    assert list(plan.rotations()) == list(plan.model.packed_layers)
    assert plan.provenance is not None
    assert plan.provenance.rotations is not None
    assert {**plan.provenance.rotations, "sha256": ""} == {"sha256": "", "texts": ["a"], "prompts": 2, "tokens": 100}
    for sides in plan.rotations().values():
        for matrix in sides.values():
            assert bool(matrix.isfinite().all())


def caught(model, tokens):
    """What each layer's attention works on, one prompt."""
    tap = Tap(Fingerprint.of(model).packed_layers, Window(), PAGE_TOKENS)
    with torch.no_grad(), tapped(model, tap):
        model(tokens, use_cache=False)
    return tap.caught


def read_errors(model, layer, attention, side, matrix) -> float:
    """Mean squared error that queries see in scores, or the hidden state in outputs, of 2-bit keys or values."""
    x = (attention.key if side == "key" else attention.value)[0, :, :192]
    fmt = (PER_CHANNEL if side == "key" else PER_TOKEN).format(16)
    if matrix == "hadamard":
        stored = codecs.as_stored(x, Format(2, fmt.grouping, fmt.group_size, rotation="hadamard"), 64).double()
    else:
        stored = codecs.as_stored((x.double() @ matrix.double()).float(), fmt, 64).double() @ matrix.double().inverse()
    error = stored - x.double()
    if side == "key":
        return float((attention.query[0].double() @ error[:, None].mT).square().mean())
    weight = model.get_decoder().layers[layer].self_attn.o_proj.weight.detach().double()
    heads = weight.unflatten(1, (2, -1, 16))
    return float(torch.einsum("ohgd,htd->thgo", heads, error).square().mean())


def skewed(model):
    """The model with queries and outputs that look at few directions much, as trained ones do."""
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            directions = torch.logspace(0.5, -1.5, 8).repeat(2)[:16]
            for name in ("q_proj", "k_proj"):
                layer.self_attn.get_submodule(name).weight.unflatten(0, (-1, 16)).mul_(directions[:, None])
                directions = directions.flip(0)
            layer.self_attn.o_proj.weight.unflatten(1, (-1, 16)).mul_(torch.logspace(0.5, -1.5, 16))
    return model


def test_readers_see_smaller_errors_on_other_prompts() -> None:
    model = skewed(tiny("llama"))
    spec = LayerPlan(layers="0-2", key=PER_CHANNEL, value=PER_TOKEN)
    plan = calibrate_rotations(model, Plan(model=Fingerprint.of(model), layers=(spec,)), random_tokens(4, 260))
    others = torch.randint(3, 61, (1, 200), generator=torch.Generator().manual_seed(9))
    for layer, attention in caught(model, others).items():
        for side in ("key", "value"):
            ours = read_errors(model, layer, attention, side, plan.rotations()[layer][side])
            assert ours < 0.8 * read_errors(model, layer, attention, side, "hadamard")


def test_state_covariance_is_that_of_the_groups() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 16) + 5
    found = state_covariance(x, [PER_CHANNEL, PER_TOKEN], 64)
    expected = torch.zeros(2, 16, 16, dtype=torch.float64)
    for t in range(64):
        group = x[0, t // 32 * 32 : t // 32 * 32 + 32].double()
        away, whole = x[0, t].double() - group.mean(0), x[0, t].double()
        expected[0] += torch.outer(away, away) + 1e-3 * torch.outer(whole, whole)
        expected[1] += torch.outer(x[1, t].double(), x[1, t].double())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_groups_that_do_not_fill_a_page_start_anew_on_the_next() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 128, 16) + 5
    found = state_covariance(x, [TensorSpec(codec="kvmix3", bits=3, grouping="per_channel", group_size=11)], 64)
    expected = 1e-3 * x[0].double().T @ x[0].double()
    for page in x[0].double().split(64):
        for group in page.split(11):
            expected += (group - group.mean(0)).T @ (group - group.mean(0))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    "key",
    [
        TensorSpec(codec="kvmix3", bits=3, grouping="per_channel", group_size=11),
        TensorSpec(bits=16, grouping="per_channel", group_size=256),
    ],
)
def test_any_group_size_can_be_turned(key: TensorSpec) -> None:
    model = tiny("llama")
    plan = Plan(model=Fingerprint.of(model), layers=(LayerPlan(layers="0-2", key=key, value=PER_TOKEN),))
    turned = calibrate_rotations(model, plan, random_tokens(1, 200))
    assert turned.spec(0).value.rotation == "calibrated"
    assert turned.spec(0).key.rotation == ("calibrated" if key.bits == 3 else None)


def test_output_moment_is_what_the_projection_makes_of_an_error() -> None:
    model = tiny("llama")
    weight = model.get_decoder().layers[1].self_attn.o_proj.weight.detach().double()
    error = torch.randn(2, 16, dtype=torch.float64)
    squares = [[(weight[:, 16 * (2 * h + g) :][:, :16] @ error[h]).square().sum() for g in range(2)] for h in range(2)]
    moment = output_moment(model, 1, Fingerprint.of(model))
    for h in range(2):
        assert float(error[h] @ moment[h] @ error[h]) == pytest.approx(float(sum(squares[h])))


def test_sides_of_sixteen_bits_stay_and_heads_have_their_own() -> None:
    model = tiny("llama")
    exact = TensorSpec(bits=16, grouping="per_token")
    entries = (
        LayerPlan(layers="0-1", key=PER_CHANNEL, value=exact),
        LayerPlan(layers=2, key=exact, value=exact, heads={1: HeadPlan(value=PER_TOKEN)}),
    )
    plan = calibrate_rotations(model, Plan(model=Fingerprint.of(model), layers=entries), random_tokens(1, 100))
    assert {layer: list(sides) for layer, sides in plan.rotations().items()} == {0: ["key"], 1: ["key"], 2: ["value"]}
    assert [spec.rotation for spec in plan.spec(2).head(0)] == [None, None]
    assert [spec.rotation for spec in plan.spec(2).head(1)] == [None, "calibrated"]


def test_errors_name_what_to_do() -> None:
    model = tiny("llama")
    with pytest.raises(PlanError, match="16 bits, which round nothing"):
        calibrate_rotations(model, Plan.uniform(model, 16, 16), random_tokens(1, 100))
    with pytest.raises(ModelError, match="the plan is for"):
        calibrate_rotations(model, uniform(tiny("llama", num_key_value_heads=4)), random_tokens(1, 100))
    with pytest.raises(DataError, match="never fill a page of 64"):
        calibrate_rotations(model, uniform(model, window=Window(sinks=4)), random_tokens(1, 64))
    with pytest.raises(ModelError, match=r"FalconForCausalLM|no linear map named o_proj"):
        calibrate_rotations(falcon(), uniform(falcon()), random_tokens(1, 100))
    model.get_decoder().layers[2].self_attn.o_proj = nn.Identity()
    with pytest.raises(ModelError, match="layer 2 has no linear map named o_proj or out_proj or dense"):
        calibrate_rotations(model, uniform(model), random_tokens(1, 100))


def test_a_profile_has_no_calibrated_candidates() -> None:
    spec = TensorSpec(bits=2, grouping="per_channel", rotation="calibrated")
    with pytest.raises(PlanError, match="rotation 'calibrated' is fitted to a plan"):
        compute_profile(tiny("llama"), random_tokens(1, 100), key_specs=[spec])
