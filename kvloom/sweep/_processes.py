"""Worker processes on this machine, one for each GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import torch

from kvloom.errors import DataError
from kvloom.sweep._job import Job
from kvloom.sweep._runner import Outcome, Runner, Watch

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"
_KILLED = -9


class Processes(Runner):
    """One process for each GPU, which sees no other; without GPUs, processes that share the CPU's cores.

    Args:
        count: processes; by default all GPUs, or one on a CPU. On a CPU rounding depends on the threads of a process,
            of which each has its share unless `OMP_NUM_THREADS` is set.

    Raises:
        DataError: there are fewer GPUs than processes, or no process at all.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise DataError(f"processes is {count}: give at least 1.")
        gpus = _gpus()
        if count is not None and gpus and count > len(gpus):
            raise DataError(f"processes is {count}, and there are {len(gpus)} GPUs: give at most one process a GPU.")
        self._slots = _gpu_slots(gpus[:count]) if gpus else _cpu_slots(count or 1)

    def run(self, jobs: Sequence[Job], folder: Path, watch: Watch) -> Generator[Outcome]:
        """See `Runner.run`."""
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        waiting, outcomes = deque(jobs), SimpleQueue[Outcome | Future[None]]()
        workers = [_Worker(name, extra, folder, watch) for name, extra in list(self._slots.items())[: len(jobs)]]
        with ThreadPoolExecutor(max_workers=max(1, len(workers))) as pool:
            try:
                for worker in workers:
                    pool.submit(worker.serve, waiting, outcomes).add_done_callback(outcomes.put)
                yield from _until_all_served(outcomes, len(workers))
            finally:
                waiting.clear()
                for worker in workers:
                    worker.stop()


def _until_all_served(outcomes: SimpleQueue[Outcome | Future[None]], serving: int) -> Generator[Outcome]:
    while serving:
        came = outcomes.get()
        if isinstance(came, Outcome):
            yield came
        else:
            came.result()
            serving -= 1


class _Worker:
    """A place for a worker process; after a failed job the next one gets a new process, as memory may be held.

    Args:
        name: in progress, and of its log.
        extra: what its environment has besides this process's.
        folder: the sweep's.
        watch: told what it does.
    """

    def __init__(self, name: str, extra: Mapping[str, str], folder: Path, watch: Watch) -> None:
        self._name = name
        self._extra = extra
        self._folder = folder
        self._watch = watch
        self._log = folder / "logs" / f"{name.replace(' ', '-')}.log"
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def serve(self, waiting: deque[Job], outcomes: SimpleQueue[Outcome | Future[None]]) -> None:
        """Do waiting jobs until there is none."""
        while waiting and not self._stopped:
            try:
                job = waiting.popleft()
            except IndexError:  # another worker was faster
                break
            failure = self._do(job)
            if self._stopped:
                break
            if failure:
                self._end()
            outcomes.put(Outcome(job, failure))
        self._end()

    def stop(self) -> None:
        """End what it does, at once."""
        self._stopped = True
        if self._process:
            self._process.kill()

    def _do(self, job: Job) -> str | None:
        """Why the job failed, or None."""
        self._watch(self._name, job.name, 0, 0)
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        if self._stopped:
            process.kill()
        with suppress(BrokenPipeError):  # it died before it could read; its end is told below
            process.stdin.write(job.model_dump_json(by_alias=True) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            answer = json.loads(line)
            if "ended" in answer:
                failure: str | None = answer["ended"]
                return failure
            self._watch(self._name, f"{job.name}: {answer['what']}", answer["done"], answer["total"])
        return self._how_it_died(process.wait())

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "kvloom.sweep._worker", str(self._folder)],
                env={**os.environ, **self._extra},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
            )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()

    def _how_it_died(self, code: int) -> str:
        if code == _KILLED:
            return "its process was killed, as by a machine out of memory: give less length, or fewer processes."
        return f"its process ended with code {code}: see {self._log}."


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, for `CUDA_VISIBLE_DEVICES`."""
    count = torch.cuda.device_count()
    given = os.environ.get(_VISIBLE)
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def _gpu_slots(gpus: Sequence[str]) -> dict[str, dict[str, str]]:
    return {f"GPU {gpu}": {_VISIBLE: gpu} for gpu in gpus}


def _cpu_slots(count: int) -> dict[str, dict[str, str]]:
    threads = str(max(1, (os.cpu_count() or 1) // count))
    extra = {} if count == 1 or _THREADS in os.environ else {_THREADS: threads}
    return {f"process {number}": extra for number in range(1, count + 1)}
