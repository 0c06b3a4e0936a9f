from __future__ import annotations

import pytest

from kvloom._names import unknown
from kvloom.assets import texts
from kvloom.errors import DataError, PlanError
from kvloom.evaluate import Settings, choose
from kvloom.plan import preset
from kvloom.signals import get

MANY = [f"name-{n}" for n in range(30)]


def test_few_names_are_all_told_the_nearest_first():
    assert unknown("codec", "hqqq", ["affine", "clipped", "hqq"]) == (
        "codec 'hqqq' is unknown; choose one of hqq, affine, clipped."
    )
    assert unknown("codec", "HQQ", ["affine", "hqq"]).endswith("one of hqq, affine.")


def test_many_names_are_not_all_told():
    said = unknown("text", "name-29x", MANY, listing="a list")
    assert said.startswith("text 'name-29x' is unknown; choose one of name-29, name-")
    assert said.count("name-") == 1 + 3
    assert said.endswith("; a list lists all.")
    assert unknown("text", "zzz", MANY, listing="a list") == "text 'zzz' is unknown; a list lists all."
    assert unknown("text", "zzz", MANY).count("name-") == 3


@pytest.mark.parametrize(
    ("said", "nearest", "many"),
    [
        (lambda: preset("kvlom/K4V4", None), "kvloom/K4V4", True),
        (lambda: preset("kvmix/2bit", None), "kvmix/2bit-paper", True),
        (lambda: get("error_gradients"), "error_gradient", False),
        (lambda: choose(["niah_single"], Settings()), "ruler/niah_single_1", False),
        (lambda: choose(["ruler/niah_singel_1"], Settings()), "ruler/niah_single_1", False),
        (lambda: texts(["workd"]), "worked", False),
    ],
)
def test_a_slip_of_the_pen_is_told_what_was_meant(said, nearest: str, many: bool):
    with pytest.raises((PlanError, DataError)) as caught:
        said()
    assert f"choose one of {nearest}" in str(caught.value)
    assert len(str(caught.value)) < 320
    assert not many or "kvloom.plan.presets() lists all" in str(caught.value)
