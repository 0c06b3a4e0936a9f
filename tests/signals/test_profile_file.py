from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvloom.errors import DataError
from kvloom.plan import Fingerprint, Plan, TensorSpec
from kvloom.signals import Calibration, GradientNorms, LossTable, Profile

MODEL = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=5,
    packed_layers=(1, 3),
    num_kv_heads=2,
    head_dim=64,
    dtype="float32",
)
KEYS = [TensorSpec(bits=b, grouping="per_channel", group_size=64) for b in (2, 3, 4)]
VALUES = [TensorSpec(bits=b, grouping="per_token", group_size="head_dim") for b in (2, 4)]


def table(**changes):
    fields = {
        "model": MODEL,
        "layers": [1, 3],
        "key_specs": KEYS,
        "value_specs": VALUES,
        "key_loss": [[0.3, 0.1, 0.02], [0.5, 0.2, 0.04]],
        "value_loss": [[0.25, 0.01], [0.125, 1 / 3]],
        "key_spread": [[0.0] * 3] * 2,
        "value_spread": [[0.0] * 2] * 2,
    }
    return LossTable(**{**fields, **changes})


def profile(**changes):
    fields = {
        "model": MODEL,
        "gradient": GradientNorms(key=[1.0, 2.0], value=[3.0, 4.0], key_spread=[0.1, 0.2], value_spread=[0.3, 0.4]),
        "table": table(),
        "calibration": Calibration(sha256="0f" * 32, texts=["worked.txt"], prompts=16, tokens=512, seed=0),
        "seconds": 12.5,
    }
    return Profile(**{**fields, **changes})


@settings(max_examples=30)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_a_profile_survives_its_file_to_the_last_bit(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    written = profile(table=table(key_loss=[row, row]))
    written.save(path)
    assert Profile.load(path) == written
    assert list(path.parent.iterdir()) == [path]


def test_saving_again_replaces_the_file(tmp_path):
    path = tmp_path / "profile.json"
    profile(seconds=1.0).save(path)
    profile(seconds=2.0).save(str(path))
    assert Profile.load(str(path)).seconds == 2.0


@settings(max_examples=30)
@given(share=st.floats(0, 0.999))
def test_a_file_cut_short_is_refused(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile().save(path)
    text = path.read_text("utf-8").rstrip()
    path.write_text(text[: int(share * len(text))], "utf-8")
    with pytest.raises(DataError, match=r"profile\.json is not complete JSON .*kvloom profile MODEL"):
        Profile.load(path)


def test_a_missing_file_is_told_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the profile .*none\.json: No such file"):
        Profile.load(tmp_path / "none.json")


def test_a_folder_is_no_profile(tmp_path):
    with pytest.raises(DataError, match="cannot read the profile"):
        Profile.load(tmp_path)


def test_bytes_are_no_profile(tmp_path):
    path = tmp_path / "profile.json"
    path.write_bytes(b"\xff\xfe\x00PK")
    with pytest.raises(DataError, match="is not a text file"):
        Profile.load(path)


@pytest.mark.parametrize("foreign", ["[]", "3", "{}", '{"layers": []}'])
def test_foreign_json_is_refused(tmp_path, foreign):
    path = tmp_path / "profile.json"
    path.write_text(foreign, "utf-8")
    with pytest.raises(DataError, match=r"profile\.json is not a profile: "):
        Profile.load(path)


def test_a_plan_is_no_profile(tmp_path):
    path = tmp_path / "kv_plan.json"
    Plan.uniform(MODEL).save(path)
    with pytest.raises(DataError, match=r"is not a profile: gradient: Field required"):
        Profile.load(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("schema_version",), 2, "schema_version: Input should be 1"),
        (("surprise",), 1, "surprise: Extra inputs are not permitted"),
        (("calibration", "sha256"), "abc", "calibration.sha256: String should match"),
        (("table", "key_loss", 0, 1), None, "table.key_loss.0.1: Input should be a valid number"),
        (("table", "key_specs", 0, "bits"), 7, "table.key_specs.0.bits: Input should be"),
        (("table", "layers"), [1, 2], "table: layers must equal model.packed_layers (1, 3)"),
        (("gradient", "key"), [1.0], "gradient.key must have 2 numbers"),
        (("model", "num_kv_heads"), 4, "table.model must equal model"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, where, value, message):
    path = tmp_path / "profile.json"
    profile().save(path)
    data = json.loads(path.read_text("utf-8"))
    inner = data
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(DataError) as caught:
        Profile.load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["key_loss", "value_loss", "key_spread", "value_spread"])
@pytest.mark.parametrize("rows", [[[0.0]], [[0.0] * 3], [[0.0] * 4] * 2], ids=str)
def test_tables_have_a_row_a_layer_and_a_column_a_candidate(field, rows):
    with pytest.raises(ValidationError, match=rf"{field} must have 2 rows \(layers\) of"):
        table(**{field: rows})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_are_finite(bad):
    with pytest.raises(ValidationError, match="finite number"):
        table(value_loss=[[0.0, bad], [0.0, 0.0]])


def test_a_candidate_is_named_once():
    with pytest.raises(ValidationError, match="key_specs must not name the same format twice"):
        table(key_specs=[*KEYS[:2], KEYS[0]])


def test_predicted_losses_add_up():
    specs = {1: (KEYS[1], VALUES[0]), 3: (KEYS[2], VALUES[1])}
    assert table().predicted_loss(specs) == pytest.approx(0.1 + 0.25 + 0.04 + 1 / 3)


def test_a_format_that_was_not_measured_has_no_predicted_loss():
    unmeasured = TensorSpec(bits=3, grouping="per_token", group_size="head_dim")
    specs = dict.fromkeys((1, 3), (KEYS[0], unmeasured))
    with pytest.raises(DataError, match="value_specs of the loss table lacks 3b/tok-head"):
        table().predicted_loss(specs)


def test_every_layer_needs_a_format():
    with pytest.raises(DataError, match=r"exactly the layers \[1, 3\]"):
        table().predicted_loss({1: (KEYS[0], VALUES[0])})


KEY_HEADS = [[[0.1, 0.05, 0.01], [0.2, 0.05, 0.01]], [[0.5, 0.0, 0.04], [0.0, 0.2, 0.0]]]


def test_losses_of_heads_survive_the_file(tmp_path):
    written = profile(table=table(key_head_loss=KEY_HEADS))
    written.save(tmp_path / "profile.json")
    read = Profile.load(tmp_path / "profile.json").table
    assert (read.key_head_loss, read.value_head_loss) == (KEY_HEADS, None)


@pytest.mark.parametrize(
    ("heads", "why"),
    [
        (KEY_HEADS[:1], r"key_head_loss must have 2 rows \(layers\)"),
        ([KEY_HEADS[0], KEY_HEADS[1][:1]], r"key_head_loss must have 2 rows \(heads\) of 3 \(specs\) in each layer"),
        ([KEY_HEADS[0], [[0.5], [0.0]]], r"key_head_loss must have 2 rows \(heads\) of 3 \(specs\) in each layer"),
        ([KEY_HEADS[1], KEY_HEADS[0]], "key_head_loss must add up to the layers' losses"),
    ],
)
def test_losses_of_heads_that_do_not_fit_are_refused(heads, why):
    with pytest.raises(ValidationError, match=why):
        table(key_head_loss=heads)


def test_a_profile_without_gradient_norms_survives_its_file(tmp_path):
    written = profile(gradient=None)
    written.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == written


def test_a_file_from_before_heads_is_read(tmp_path):
    path = tmp_path / "profile.json"
    profile().save(path)
    data = json.loads(path.read_text("utf-8"))
    for field in ("key_head_loss", "value_head_loss"):
        del data["table"][field]
    path.write_text(json.dumps(data), "utf-8")
    assert Profile.load(path) == profile()
