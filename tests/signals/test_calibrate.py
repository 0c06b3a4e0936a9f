"""Everything a plan needs of calibration, in one call: what is made, in which order, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kvloom import calibrate
from kvloom.cache import LoomCache
from kvloom.errors import PlanError
from kvloom.plan import Fingerprint, Plan, TensorSpec
from kvloom.signals import calibrate_codebooks, calibrate_rotations
from kvloom.signals._codebooks import _attention
from kvloom.signals._prompts import Prompts
from tests.signals.models import random_tokens, tiny

KEY = TensorSpec(codec="nuq", bits=2, grouping="per_channel", group_size=64)
VALUE = TensorSpec(codec="nuq", bits=3, grouping="per_token", group_size="head_dim")
PLAIN = TensorSpec(bits=4, grouping="per_channel", group_size=64)
BEFORE = PLAIN.model_copy(update={"pre_rope": True})


def plan_of(model, key: TensorSpec, value: TensorSpec) -> Plan:
    shape = Fingerprint.of(model)
    return Plan.from_specs(shape, dict.fromkeys(shape.packed_layers, (key, value)))


def test_each_part_is_what_its_own_function_makes() -> None:
    model, tokens = tiny("llama"), random_tokens(2, 130)
    books, plain = plan_of(model, KEY, VALUE), plan_of(model, PLAIN, PLAIN)
    assert calibrate(model, books, tokens, texts=["a"]) == calibrate_codebooks(model, books, tokens, texts=["a"])
    assert calibrate(model, plain, tokens, rotate=True) == calibrate_rotations(model, plain, tokens)


def test_codebooks_are_those_of_what_the_rotations_make() -> None:
    model, tokens, seen = tiny("llama"), random_tokens(1, 130), []
    plan = plan_of(model, PLAIN, VALUE)
    made = calibrate(model, plan, tokens, rotate=True, progress=lambda *report: seen.append(report[:2]))
    assert seen == [(0, 1), (1, 1)] * 2
    spec, forward = made.spec(1).value, made.rotations()[1]["value"].float()
    assert (spec.rotation, len(spec.codebook)) == ("calibrated", 8)
    caught = _attention(model, made.model, Prompts.of(model, tokens, None, 0))[1]
    x = caught.value[0, :, :128] @ forward
    slope = caught.state_gradients()[1][0, :, :128] @ torch.linalg.inv(forward).mT
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    unit, weight = (2 * x - high - low) / (high - low), ((high - low) / 2 * slope).square()
    points = torch.tensor(spec.codebook)
    nearest = (unit[..., None] - points).abs().argmin(-1)
    for code, point in enumerate(points):
        own = nearest == code
        assert float((weight * unit)[own].sum() / weight[own].sum()) == pytest.approx(float(point), abs=5e-3)
    again = calibrate(model, made, tokens)  # without `rotate` the matrices stay, and so do codebooks of the same text
    assert again == made
    cache = LoomCache(made, model)
    model(tokens, past_key_values=cache)
    assert cache.nbytes() == made.nbytes(1, 130, "float32")


def test_keys_before_rope_are_not_turned() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 70)
    made = calibrate(model, plan_of(model, BEFORE, PLAIN), tokens, rotate=True)
    assert made.spec(0).key == BEFORE
    assert made.spec(0).value.rotation == "calibrated"
    assert Plan.model_validate_json(made.to_json()).layers == made.layers


def test_nothing_to_do_is_refused() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 70)
    with pytest.raises(PlanError, match=r"^the plan has nothing to calibrate: .*'nuq'.*kvloom calibrate --rotate"):
        calibrate(model, plan_of(model, PLAIN, PLAIN), tokens)
    with pytest.raises(PlanError, match="nothing to rotate"):
        calibrate(model, plan_of(model, BEFORE, PLAIN.model_copy(update={"bits": 16})), tokens, rotate=True)
