"""The shared search: one process, several, killed ones, on a synthetic objective."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import _extras
from kvloom.allocate import StudySettings
from kvloom.allocate._study import Space, run_study
from kvloom.errors import MissingExtraError, PlanError

optuna = pytest.importorskip("optuna", minversion="5")

SIZES = (4, 3, 5)
WORKER = """
import sys, time
from pathlib import Path
from kvloom.allocate import StudySettings
from kvloom.allocate._study import Space, run_study

storage, trials, hang = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3

def measure(picks):
    if hang and picks not in ((0, 0, 0), (3, 2, 4)):
        Path(sys.argv[3]).write_text(repr(picks))
        time.sleep(600)
    time.sleep(0.05)
    return float((picks[0] - 2) ** 2 + picks[2]), float(sum(picks))

space = Space((4, 3, 5), measure, lambda picks: float(sum(picks) - 6), ((0, 0, 0), (3, 2, 4)), "synthetic")
run_study(space, StudySettings(trials, "moead", 1, storage, beat=0.1), lambda *_: None)
"""


def silent(*_):
    pass


def space(measured=None, about="synthetic"):
    def measure(picks):
        if measured is not None:
            measured.append(picks)
        return float((picks[0] - 2) ** 2 + picks[2]), float(sum(picks))

    return Space(SIZES, measure, lambda picks: float(sum(picks) - 6), ((0, 0, 0), (3, 2, 4)), about)


@pytest.mark.parametrize(("sampler", "trials"), [("nsga2", 150), ("moead", 60)])
def test_it_ends_near_the_front_and_again_so(sampler, trials):
    runs = [run_study(space(), StudySettings(trials, sampler, seed=3), silent) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == trials
    assert [it.picks for it in runs[0][:2]] == [(0, 0, 0), (3, 2, 4)]
    for it in runs[0]:
        assert all(0 <= pick < size for pick, size in zip(it.picks, SIZES, strict=True))
        assert it.values == ((it.picks[0] - 2) ** 2 + it.picks[2], sum(it.picks))
    assert (0.0, 2.0) in {it.values for it in runs[0]}  # (2, 0, 0) is best
    assert len({it.picks for it in runs[0]}) > 15


@pytest.mark.parametrize("sampler", ["nsga2", "moead"])
def test_proposals_learn_to_keep_to_the_constraint(sampler):
    """Both objectives want what the constraint forbids; of random picks one in six keeps to it."""
    own = Space((6,) * 4, lambda picks: (-float(sum(picks)), -float(picks[0])), lambda picks: sum(picks) - 6.0, (), "c")
    found = [sum(it.picks) <= 6 for it in run_study(own, StudySettings(200, sampler, seed=1), silent)]
    assert sum(found[:20]) < 10
    assert sum(found[-80:]) > 40


def test_what_was_measured_once_is_not_measured_again():
    measured = []
    found = run_study(space(measured), StudySettings(60), silent)
    assert len(measured) == len(set(measured)) == len({it.picks for it in found})


@pytest.mark.parametrize("url", ["{}/search.log", "sqlite:///{}/search.db"])
def test_a_stopped_search_goes_on(tmp_path, url):
    storage = url.format(tmp_path)
    alone = run_study(space(), StudySettings(25, seed=5), silent)
    run_study(space(), StudySettings(10, seed=5, storage=storage), silent)
    measured = []
    found = run_study(space(measured), StudySettings(25, seed=5, storage=storage), silent)
    assert found == alone
    assert len(measured) <= 15
    assert run_study(space(), StudySettings(25, storage=storage), silent) == alone


def test_another_problem_is_refused_in_the_same_study(tmp_path):
    kept = StudySettings(3, storage=str(tmp_path / "new" / "search.log"))
    run_study(space(), kept, silent)
    with pytest.raises(PlanError, match=r"the study 'kvloom' in .* searches something else"):
        run_study(space(about="other"), kept, silent)
    assert len(run_study(space(about="other"), replace(kept, name="second"), silent)) == 3


def start(*words):
    return subprocess.Popen([sys.executable, "-c", WORKER, *map(str, words)])


def test_processes_share_a_study_and_a_killed_ones_trial_is_tried_again(tmp_path: Path):
    storage, marker = tmp_path / "search.log", tmp_path / "hangs"
    doomed = start(storage, 40, marker)
    while not marker.exists():
        assert doomed.poll() is None, "the process that is to be killed ended by itself"
        time.sleep(0.05)
    doomed.kill()
    doomed.wait()
    others = [start(storage, 40) for _ in range(2)]
    assert [process.wait(timeout=120) for process in others] == [0, 0]
    found = run_study(space(), StudySettings(40, storage=str(storage)), silent)
    backend = optuna.storages.journal.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    trials = optuna.load_study(study_name="kvloom", storage=backend).trials
    states = {name: [it for it in trials if it.state.name == name] for name in ("COMPLETE", "FAIL", "RUNNING")}
    assert 40 <= len(found) == len(states["COMPLETE"]) <= 41
    assert not states["RUNNING"]
    (lost,) = states["FAIL"]
    assert repr(tuple(lost.params.values())) == marker.read_text()
    (again,) = [it for it in trials if it.user_attrs.get("retry_of") == lost.number]
    assert again.state.name == "COMPLETE"
    assert again.params == lost.params


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from(["nsga2", "moead"]), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_space_is_searched_within_its_bounds(seed, sampler, sizes):
    own = Space(tuple(sizes), lambda picks: (float(-sum(picks)), float(sum(picks))), lambda _: 0.0, (), "any")
    found = run_study(own, StudySettings(25, sampler, seed), silent)
    options = set(itertools.product(*map(range, sizes)))
    assert {it.picks for it in found} <= options


def test_no_trials_and_no_optuna_are_refused(monkeypatch):
    with pytest.raises(PlanError, match="trials is 0"):
        StudySettings(0)
    monkeypatch.setattr(_extras, "_found", lambda module: module != "optuna")
    with pytest.raises(MissingExtraError, match=r"A search needs optuna: run pip install 'kvloom\[search\]'"):
        run_study(space(), StudySettings(1), silent)
