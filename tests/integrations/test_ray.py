"""Sweeps on a Ray that runs on this machine."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from kvloom import _extras
from kvloom.errors import MissingExtraError
from kvloom.evaluate import pieces_path
from kvloom.sweep import Sweep, TaskEntry, make_jobs, sweep
from tests.sweep.conftest import home as home
from tests.sweep.runners import Here, lasting


def test_ray_is_an_extra(monkeypatch):
    from kvloom.integrations.ray import Ray

    monkeypatch.setattr(_extras, "_found", lambda module: module != "ray")
    with pytest.raises(MissingExtraError, match=r"A sweep on a Ray cluster needs ray: run pip install 'kvloom\[ray\]'"):
        Ray("local")


@pytest.fixture
def cluster(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def keys(file: Path) -> list[str]:
    return [json.loads(line)["key"] for line in file.read_text().splitlines()]


def test_killed_workers_and_cut_jobs_go_on_after_their_last_piece(home, cluster, tmp_path):
    from kvloom.integrations.ray import Ray

    gsm8k = TaskEntry(task="gsm8k", limit=4, shots=1, data=home / "data")
    fidelity = TaskEntry(task="fidelity", windows=1, window=300)
    too_long = TaskEntry(task="ruler/vt", lengths=(9000,), limit=1)
    plans = [str(home / "k2-tiny.json")]
    made = make_jobs(Sweep(models=[str(home / "tiny")], plans=plans, tasks=[gsm8k, fidelity, too_long]))
    killed = {}

    def watch(who, what, done, total):
        if "k2-tiny: gsm8k" in what and done and not killed:
            killed[int(who.rpartition(":")[2])] = done
            os.kill(*killed, signal.SIGKILL)

    out = tmp_path / "ray"
    swept = sweep(made, out, runner=Ray("local"), watch=watch)
    assert len(killed) == 1
    assert list(swept.failures) == ["tiny, ruler/vt, dense", "tiny, ruler/vt, k2-tiny"]
    assert "and the model reads 2048" in swept.failures["tiny, ruler/vt, dense"]
    assert "DataError" in (out / "logs" / "ray.log").read_text()
    sweep(made, tmp_path / "here", runner=Here())
    assert lasting(out) == lasting(tmp_path / "here")
    assert len(lasting(out)) == 4
    pieces = pieces_path(out / made.jobs[1].results)
    assert len(keys(pieces)) == 4
    assert max(Counter(keys(pieces)).values()) == 1, "a piece was done again after the kill"

    (out / made.jobs[1].results).unlink()
    whole = pieces.read_bytes()
    cut = whole[: whole.rfind(b"\n", 0, -1) + 9]  # the driver was killed while it wrote the last piece
    pieces.write_bytes(cut)
    sweep(made, out, runner=Ray("local"))
    assert lasting(out) == lasting(tmp_path / "here")
    assert keys(pieces) == [json.loads(line)["key"] for line in whole.splitlines()]
