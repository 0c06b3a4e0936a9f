"""Running sweeps: what is finished is not repeated, what fails stops nothing, what is killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from kvloom.errors import DataError
from kvloom.sweep import JOBS, LmEvalEntry, Processes, Sweep, TaskEntry, make_jobs, sweep, why
from kvloom.sweep import _processes as processes
from tests.sweep.runners import Here, lasting


def jobs(home: Path, *tasks, plans=("kvloom/K4V4",), models=("tiny",)):
    return make_jobs(Sweep(models=[str(home / it) for it in models], plans=plans, tasks=tasks))


def gsm8k(home: Path, limit: int = 1) -> TaskEntry:
    return TaskEntry(task="gsm8k", limit=limit, shots=1, data=home / "data")


FIDELITY = TaskEntry(task="fidelity", windows=1, window=300)
TOO_LONG = TaskEntry(task="ruler/vt", lengths=(9000,), limit=1)


def test_finished_jobs_are_not_repeated_until_they_are_others(home, tmp_path):
    first, second = Here(), Here()
    made = jobs(home, gsm8k(home), FIDELITY)
    swept = sweep(made, tmp_path, runner=first)
    assert first.done == [job.name for job in made.jobs]
    assert [(it["kind"], it["name"]) for it in swept.records["tiny"]] == [
        ("task", "dense"),
        ("task", "kvloom/K4V4"),
        ("fidelity", "dense"),
        ("fidelity", "kvloom/K4V4"),
    ]
    assert sweep(made, tmp_path, runner=second) == swept
    assert second.done == []
    more = jobs(home, gsm8k(home, limit=2), FIDELITY)
    grown = sweep(more, tmp_path, runner=second)
    assert second.done == [job.name for job in more.jobs[:2]]
    assert [it["total"] for it in grown.records["tiny"][:2]] == [2, 2]
    assert len(lasting(tmp_path)) == 4
    (tmp_path / made.jobs[2].results).unlink()
    back = Here()
    again = sweep(made, tmp_path, runner=back)
    assert back.done == [made.jobs[0].name, made.jobs[1].name, made.jobs[2].name]
    assert [it["total"] for it in again.records["tiny"][:2]] == [1, 1]


def test_a_failure_stops_nothing_and_is_told(home, tmp_path):
    said = []
    made = jobs(home, TOO_LONG, FIDELITY, plans=())
    swept = sweep(made, tmp_path, runner=Here(), watch=lambda *it: said.append(it))
    assert list(swept.failures) == ["tiny, ruler/vt, dense"]
    assert "and the model reads 2048" in swept.failures["tiny, ruler/vt, dense"]
    assert [it["kind"] for it in swept.records["tiny"]] == ["fidelity"]
    assert [it for it in said if it[0] == JOBS] == [
        (JOBS, "finished", 0, 2),
        (JOBS, "finished, 1 failed", 1, 2),
        (JOBS, "finished, 1 failed", 2, 2),
    ]


def test_two_sweeps_do_not_share_a_folder(home, tmp_path):
    made = jobs(home, FIDELITY, plans=())

    class Second(Here):
        def run(self, jobs, folder, watch):
            with pytest.raises(DataError, match="Another sweep is running"):
                sweep(made, folder, runner=Here())
            yield from super().run(jobs, folder, watch)

    assert not sweep(made, tmp_path, runner=Second()).failures


def test_a_sweep_of_lm_eval_tasks(home, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.json").write_text(json.dumps({"question": "2 and 2?", "choices": [" 4", " 5"], "label": 0}))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    made = jobs(home, LmEvalEntry(tasks=("sums",), include=tmp_path))
    swept = sweep(made, tmp_path / "out", runner=Here())
    assert not swept.failures
    assert [(it["task"], it["name"], it["total"]) for it in swept.records["tiny"]] == [
        ("lm-eval/sums", "dense", 1),
        ("lm-eval/sums", "kvloom/K4V4", 1),
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_running_out_of_memory_is_one_sentence(error):
    assert why(error) == "memory ran out: give less length, or a device with more."


def test_what_nobody_expected_is_one_line():
    assert why(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert why(ValueError("a\nb")) == "ValueError: a b"


def test_a_killed_process_fails_its_job_and_another_takes_its_place(home, tmp_path, monkeypatch):

    started = []
    start = processes._Worker._start

    def noted(worker):
        started.append(start(worker))
        return started[-1]

    monkeypatch.setattr(processes._Worker, "_start", noted)
    killed = []

    def watch(who, what, done, total):
        if who == "process 1" and total and not killed:
            killed.append(what.partition(":")[0])
            started[0].kill()

    made = jobs(home, gsm8k(home), FIDELITY, TOO_LONG, plans=())
    swept = sweep(made, tmp_path, runner=Processes(1), watch=watch)
    assert killed == ["tiny, gsm8k, dense"]
    assert swept.failures["tiny, gsm8k, dense"].startswith("its process was killed, as by a machine out of memory")
    assert "and the model reads 2048" in swept.failures["tiny, ruler/vt, dense"]
    assert [it["kind"] for it in swept.records["tiny"]] == ["fidelity"]
    assert len(started) == 2
    assert all(it.poll() is not None for it in started)
    assert "DataError" in (tmp_path / "logs" / "process-1.log").read_text()


@pytest.mark.parametrize("wrong", [0, -1])
def test_there_is_at_least_one_process(wrong):
    with pytest.raises(DataError, match="give at least 1"):
        Processes(wrong)


def test_each_gpu_has_one_process_that_sees_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert Processes()._slots == {
        "GPU 5": {"CUDA_VISIBLE_DEVICES": "5"},
        "GPU GPU-ab": {"CUDA_VISIBLE_DEVICES": "GPU-ab"},
    }
    assert list(Processes(1)._slots) == ["GPU 5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert Processes()._slots["GPU 1"] == {"CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(DataError, match="there are 2 GPUs"):
        Processes(3)


def test_processes_on_a_cpu_share_its_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert list(Processes(3)._slots.values()) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert Processes()._slots == {"process 1": {}}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Processes(2)._slots == {"process 1": {}, "process 2": {}}


SWEEP = """
models: [tiny]
plans: ["k2-{model}.json"]
tasks:
  - {task: needle, lengths: [256], limit: 12}
  - {task: gsm8k, limit: 1, shots: 1, data: data}
  - {task: ruler/niah_single_1, lengths: [300], limit: 1}
  - {task: fidelity, windows: 2, window: 300}
"""


def command(*words) -> list[str]:
    return [sys.executable, "-c", "from kvloom.cli import main; main()", "sweep", *map(str, words)]


def children(pid: int) -> list[int]:
    return [int(it) for task in Path(f"/proc/{pid}/task").iterdir() for it in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def keys(file: Path) -> list[str]:
    return [json.loads(line)["key"] for line in file.read_text().splitlines()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in /proc")
def test_a_sweep_killed_half_way_goes_on_to_identical_results(home, tmp_path):
    file, out = home / "sweep.yaml", tmp_path / "killed"
    file.write_text(SWEEP)
    pieces = out / "results" / "tiny" / "needle" / "k2-tiny.jsonl.pieces"
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command(file, "-o", out), stderr=log, stdout=log)
    while not (pieces.exists() and pieces.read_bytes().count(b"\n")):
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    (worker,) = children(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < deadline, "the worker outlives its sweep"
        time.sleep(0.05)
    before = {it: it.read_bytes() for it in out.rglob("*.pieces")}
    finished = (out / "results" / "tiny" / "needle" / "dense.jsonl").read_bytes()
    assert not (out / "results" / "tiny" / "needle" / "k2-tiny.jsonl").exists()
    assert len(keys(pieces)) < 12

    done = subprocess.run(command(file, "-o", out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for it, content in before.items():
        assert it.read_bytes().startswith(content[: content.rfind(b"\n") + 1]), "a finished piece was done again"
    assert (out / "results" / "tiny" / "needle" / "dense.jsonl").read_bytes() == finished
    assert max(Counter(keys(pieces)).values()) == 1
    whole = sweep(make_jobs(Sweep.load(file)), tmp_path / "whole", runner=Here())
    assert not whole.failures
    assert lasting(out) == lasting(tmp_path / "whole")
    assert len(lasting(out)) == 8
    for task in ("gsm8k", "needle", "ruler/niah_single_1", "KLD"):
        assert task in done.stdout
