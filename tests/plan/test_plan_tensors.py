"""A plan's tensors lie beside it: read when asked for, counted, and refused when they are not the plan's."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from kvloom.errors import PlanError
from kvloom.plan import Fingerprint, Plan, PlanTensors, convert, export_plan, import_plan, rotation_name
from tests.plan.shapes import shape

MODEL = shape(layers=2, heads=3, dim=32)
SIDES = ("key", "value")


def matrices(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = [rotation_name(layer, side) for layer in MODEL.packed_layers for side in SIDES]
    return {name: torch.randn(3, 32, 32).half() for name in names} | changes


def data(**key: object) -> dict[str, object]:
    side = {"bits": 2, "grouping": "per_channel", "rotation": "calibrated"}
    return {"model": MODEL, "layers": [{"layers": "0-1", "key": side | key, "value": side}]}


def made(tensors: dict[str, torch.Tensor] | None = None) -> Plan:
    return Plan.model_validate(data() | {"tensors": PlanTensors.of(matrices() if tensors is None else tensors)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made().save(tmp_path / "two.json")
    return tmp_path / "two.json"


def beside(path: Path) -> Path:
    return path.with_name("two.tensors.safetensors")


def test_a_plan_and_its_tensors_come_back(saved: Path) -> None:
    plan = Plan.load(saved)
    assert plan == made()
    assert json.loads(saved.read_text())["tensors"]["file"] == beside(saved).name
    assert {path.name for path in saved.parent.iterdir()} == {"two.json", "two.tensors.safetensors"}
    for layer, sides in plan.rotations().items():
        for side, matrix in sides.items():
            assert torch.equal(matrix, matrices()[rotation_name(layer, side)])
    assert plan.rotations()[0]["key"] is copy.deepcopy(plan).rotations()[0]["key"]


def test_a_plan_is_read_without_its_tensors_and_without_torch(saved: Path) -> None:
    code = (
        "import sys; from kvloom.plan import Plan; plan = Plan.load(sys.argv[1]); "
        "print(plan.nbytes(1, 640), 'torch' in sys.modules)"
    )
    beside(saved).unlink()
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(made().nbytes(1, 640)), "False"]


def test_matrices_count_once_whatever_the_batch() -> None:
    plain = Plan.uniform(MODEL, 2, 2, value_group_size=32)
    turned = {"layers": 0, "key": {"bits": 2, "grouping": "per_channel", "rotation": "calibrated"}}
    rest = {"layers": 1, "key": plain.layers[0].key, "value": plain.layers[0].value}
    entries = [turned | {"value": plain.layers[0].value}, rest]
    plan = Plan.model_validate({"model": MODEL, "layers": entries, "tensors": PlanTensors.of(matrices())})
    for batch, tokens, dtype, width in ((1, 64, "float16", 4), (5, 640, "float32", 4), (2, 100, "float64", 8)):
        more = plan.nbytes(batch, tokens, dtype) - plain.nbytes(batch, tokens, dtype)
        assert more == 3 * 32 * 32 * (2 + width)
    assert list(plan.rotations()) == [0]
    assert list(plan.rotations()[0]) == ["key"]


def test_a_copy_under_another_name_has_its_own_file(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "three.json"
    other.parent.mkdir()
    Plan.load(saved).save(other)
    beside(saved).unlink()
    assert Plan.load(other).rotations()[1]["value"].shape == (3, 32, 32)


def refuse(path: Path, says: str) -> None:
    plan = Plan.load(path)
    for ask in (plan.rotations, lambda: plan.save(path.with_name("copy.json"))):
        with pytest.raises(PlanError, match=says) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert beside(path).name in str(caught.value)
    assert not path.with_name("copy.json").exists()


def test_a_missing_file(saved: Path) -> None:
    beside(saved).unlink()
    refuse(
        saved, "cannot read .*: No such file or directory; keep the two files together, or .* kvloom calibrate --rotate"
    )


def test_a_file_that_is_cut_short_or_anothers(saved: Path) -> None:
    whole = beside(saved).read_bytes()
    for content in (whole[:-1], whole[:100], b"", save(matrices(more=torch.zeros(1)))):
        beside(saved).write_bytes(content)
        refuse(saved, "does not hold the tensors that the plan was saved with")


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_a_file_without_what_the_plan_asks_for(saved: Path, change: str) -> None:
    name = rotation_name(1, "value")
    tensors = load_file(beside(saved))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:2] if change == "shape" else tensors[name].float()
    with pytest.raises(PlanError, match=rf"no float16 tensor {name} of shape \[3, 32, 32\]"):
        made(tensors).rotations()


def test_a_file_of_another_kind(saved: Path) -> None:
    beside(saved).write_text("hello")
    edited = json.loads(saved.read_text())
    edited["tensors"]["sha256"] = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    saved.write_text(json.dumps(edited))
    with pytest.raises(PlanError, match="is not a safetensors file"):
        Plan.load(saved).rotations()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (data(), "rotation is calibrated and the plan names no tensors: make them with kvloom calibrate --rotate"),
        (data(bits=16), "rotation has no meaning for 16 bits"),
        (
            Plan.uniform(MODEL).model_dump() | {"tensors": {"sha256": "0" * 64}},
            "tensors names a file that no layer asks for",
        ),
        (data() | {"tensors": {"sha256": "0" * 63}}, r"tensors\.sha256"),
        (data() | {"tensors": {"sha256": "0" * 64, "file": "../secret"}}, r"tensors\.file"),
    ],
)
def test_wrong_plans(tmp_path: Path, fields: dict[str, object], says: str) -> None:
    model = Fingerprint.model_validate(fields["model"]).model_dump(mode="json")
    (tmp_path / "kv_plan.json").write_text(json.dumps(fields | {"model": model}, default=list))
    with pytest.raises(PlanError, match=says):
        Plan.load(tmp_path / "kv_plan.json")


def test_formats_keep_the_tensors_or_refuse(saved: Path) -> None:
    assert import_plan(saved, "kvloom", MODEL).rotations()[0]["key"].shape == (3, 32, 32)
    with pytest.raises(PlanError, match=r"tensors lie in a file of their own, two\.tensors\.safetensors"):
        export_plan(Plan.load(saved), "kvloom")
    with pytest.raises(PlanError, match="tensors lie"):
        convert(saved, saved.with_name("out.json"), MODEL)
    assert not saved.with_name("out.json").exists()


def test_saving_goes_around_files_of_other_names(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    made().save(tmp_path / "model.json")
    assert (tmp_path / "model.safetensors").read_bytes() == before
