"""A profile that was killed goes on where it stopped, and ends as it would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvloom import codecs, eviction
from kvloom.errors import DataError
from kvloom.plan import Evict, TensorSpec
from kvloom.signals import Signal, compute_eviction, compute_profile, registered
from tests.signals.models import random_tokens, tiny

SPECS = {
    "key_specs": [TensorSpec(bits=2, grouping="per_channel", group_size=64)],
    "value_specs": [TensorSpec(bits=2, grouping="per_token", group_size="head_dim")],
}


class Killed(Exception):
    pass


def killed_after(steps: int):
    def progress(done: int, total: int, what: str) -> None:
        if done == steps:
            raise Killed

    return progress


def counted(model):
    """The model, and the list that grows with every forward pass of its decoder."""
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    return model, passes


@pytest.mark.parametrize(
    ("signal", "steps", "left"),
    [("error_gradient", 2, 1), ("state_error", 2, 1), ("measured_kl", 4, 2 + 1 + 2 * (1 + 6))],
)
def test_finished_pieces_are_not_done_again(tmp_path: Path, signal: str, steps: int, left: int) -> None:
    """Of measured_kl, 4 of 6 units of the first prompt: 2 are left and the exact pass, and all of two prompts."""
    tokens, out = random_tokens(3, 80), tmp_path / "profile.json"
    whole = compute_profile(tiny("llama"), tokens, signal=signal, **SPECS)
    with pytest.raises(Killed):
        compute_profile(tiny("llama"), tokens, signal=signal, out=out, progress=killed_after(steps), **SPECS)
    model, passes = counted(tiny("llama"))
    resumed = compute_profile(model, tokens, signal=signal, out=out, **SPECS)
    assert len(passes) == left
    assert (resumed.table, resumed.gradient) == (whole.table, whole.gradient)
    assert compute_profile(model, tokens, signal=signal, out=out, **SPECS) == resumed
    assert len(passes) == left


def test_pieces_of_another_measurement_are_not_taken(tmp_path: Path) -> None:
    tokens, out = random_tokens(1, 80), tmp_path / "profile.json"
    compute_profile(tiny("llama"), tokens, out=out, **SPECS)
    others = [
        {"tokens": tokens.flip(1)},
        {"seed": 1},
        {"labels": "true"},
        {"signal": "fisher"},
        {"key_specs": [TensorSpec(bits=3, grouping="per_channel", group_size=64)]},
        {"attention_mask": torch.ones_like(tokens).index_fill(1, torch.tensor([0]), 0)},
    ]
    for change in others:
        model, passes = counted(tiny("llama"))
        arguments = {"tokens": tokens, **SPECS, **change}
        compute_profile(model, out=out, **arguments)
        assert len(passes) == 1, change
    other, passes = counted(tiny("llama", initializer_range=0.1))
    compute_profile(other, tokens, out=out, **SPECS)
    assert len(passes) == 1


def test_a_last_line_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    tokens, out = random_tokens(2, 80), tmp_path / "profile.json"
    whole = compute_profile(tiny("llama"), tokens, out=out, **SPECS)
    pieces = tmp_path / "profile.json.pieces"
    pieces.write_bytes(pieces.read_bytes()[:-20])
    model, passes = counted(tiny("llama"))
    assert compute_profile(model, tokens, out=out, **SPECS).table == whole.table
    assert len(passes) == 1


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profile.json.pieces").write_text(json.dumps({"name": "x"}) + "\n")
    with pytest.raises(DataError, match="not a file of unfinished kvloom work"):
        compute_profile(tiny("llama"), random_tokens(1, 80), out=tmp_path / "profile.json", **SPECS)


SIGNAL = """
from kvloom.signals import get


def scaled(scores):
    return 3 * scores


class Mine(type(get("state_error"))):
    name = "mine"

    def score(self, evidence):
        return scaled(super().score(evidence))
"""
CHANGED = SIGNAL.replace("3 *", "6 *")
CHILD = "from mine import Mine\nclass Child(Mine):\n    pass\n"


def profiled(signal: Signal, out: Path) -> tuple[float, int]:
    """A loss, and how many passes it took."""
    model, passes = counted(tiny("llama"))
    with registered(signal):
        table = compute_profile(model, random_tokens(1, 80), signal=signal.name, out=out, **SPECS).table
    return table.key_loss[0][0], len(passes)


def test_pieces_of_a_signal_that_has_changed_are_not_taken(tmp_path: Path, own_file) -> None:
    out = tmp_path / "profile.json"
    loss, _ = profiled(own_file(SIGNAL).Mine(), out)
    assert profiled(own_file(SIGNAL + "\n# a remark\n").Mine(), out) == (loss, 0)
    assert profiled(own_file(CHANGED).Mine(), out) == (pytest.approx(2 * loss), 1)


def test_a_signals_base_counts_too(tmp_path: Path, own_file) -> None:
    out = tmp_path / "profile.json"
    own_file(SIGNAL)
    loss, _ = profiled(own_file(CHILD, "child").Child(), out)
    own_file(CHANGED)
    assert profiled(own_file(CHILD, "child").Child(), out) == (pytest.approx(2 * loss), 1)


def test_pieces_of_a_signal_without_a_file_are_not_kept(tmp_path: Path) -> None:
    typed = {"__name__": "typed"}
    exec(SIGNAL, typed)
    for _ in range(2):
        assert profiled(typed["Mine"](), tmp_path / "profile.json")[1] == 1
    assert not list(tmp_path.iterdir())


CODEC = """
from kvloom.codecs import Affine


class Mine(Affine):
    name = "mine"

    def decode(self, encoded, fmt):
        return super().decode(encoded, fmt) * 1.5
"""


def test_pieces_of_a_codec_that_has_changed_are_not_taken(tmp_path: Path, own_file) -> None:
    losses = []
    for source in (CODEC, CODEC.replace("1.5", "2.5")):
        with codecs.registered(own_file(source).Mine()):
            specs = {"key_specs": [SPECS["key_specs"][0].model_copy(update={"codec": "mine"})]}
            out = tmp_path / "profile.json"
            table = compute_profile(
                tiny("llama"), random_tokens(1, 80), signal="state_error", out=out, **{**SPECS, **specs}
            ).table
        losses.append(table.key_loss[0][0])
    assert losses[1] > 2 * losses[0]


POLICY = """
from kvloom.eviction import KeyNorm


class Mine(KeyNorm):
    name = "mine"

    def scores(self, seen):
        return super().scores(seen)
"""


def test_pieces_of_a_policy_that_has_changed_are_not_taken(tmp_path: Path, own_file) -> None:
    losses = []
    for source in (POLICY, POLICY.replace("super()", "-super()")):
        with eviction.registered(own_file(source).Mine):
            table = compute_eviction(
                tiny("llama"),
                random_tokens(1, 200),
                candidates=[Evict(policy="mine", budget=0.25)],
                following=20,
                out=tmp_path / "table.json",
            )
        losses.append(table.loss)
    assert losses[0] != losses[1]
