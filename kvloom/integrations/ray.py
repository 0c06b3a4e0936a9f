"""Sweeps on a Ray cluster: one task a job, whose records and pieces travel back to the process that drives it.

Workers share no folder with the driver. What they finish goes to an actor, from which the driver writes it down as it
comes and a job goes on that Ray starts again elsewhere.
"""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom import Plan
from kvloom._extras import require
from kvloom._userdir import write_once
from kvloom.evaluate import Ledger, pieces_path
from kvloom.sweep import Job, Outcome, Performer, Runner, Watch, why

LOCAL = "local"
"""The address of a Ray that is started for the sweep, on this machine."""

_POLL_S = 0.5
_RETRIES = 3

Files = dict[str, bytes]
"""Contents, by paths in a sweep's folder."""


class Ray(Runner):
    """One Ray task for each job, on one GPU where the cluster has GPUs, else on one core.

    Models, data sets and texts are found by the workers as the driver names them. A job whose worker dies is started
    again up to three times, and goes on after its last piece.

    Args:
        address: of the cluster, as `ray.init` takes it; `local` starts one on this machine for as long as a sweep runs.

    Raises:
        MissingExtraError: the `ray` extra is not installed.
    """

    def __init__(self, address: str) -> None:
        self._ray: Any = require("ray", "A sweep on a Ray cluster")
        self._address = address

    def run(self, jobs: Sequence[Job], folder: Path, watch: Watch) -> Generator[Outcome]:
        """See `Runner.run`.

        Raises:
            ConnectionError: there is no cluster at the address, or it is lost.
        """
        ours = not self._ray.is_initialized()
        if ours:
            local = {"include_dashboard": False} if self._address == LOCAL else {}
            self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **local)
        try:
            yield from self._run(jobs, folder, watch)
        except self._ray.exceptions.RayError as error:
            raise ConnectionError(
                f"The Ray cluster at {self._address} was lost ({type(error).__name__}): run the sweep again, which "
                "goes on where it stopped."
            ) from error
        finally:
            if ours:
                self._ray.shutdown()

    def _run(self, jobs: Sequence[Job], folder: Path, watch: Watch) -> Generator[Outcome]:
        gpus = 1 if self._ray.cluster_resources().get("GPU") else 0
        post = self._ray.remote(num_cpus=0)(_Post).remote()
        task = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_perform)
        running = {task.remote(job, _files(job, folder), post): job for job in jobs}
        try:
            while running:
                ended, _ = self._ray.wait(list(running), timeout=_POLL_S)
                _write_down(self._ray.get(post.collect.remote()), folder, watch)
                for ref in ended:
                    job = running.pop(ref)
                    failure = self._finish(ref, job, folder)
                    post.forget.remote(str(job.results))
                    yield Outcome(job, failure)
        finally:
            for ref in running:
                self._ray.cancel(ref, force=True)
            self._ray.kill(post)

    def _finish(self, ref: Any, job: Job, folder: Path) -> str | None:
        """Write a job's records; why it failed, or None."""
        try:
            done: _Done = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return f"Ray lost its worker {_RETRIES + 1} times ({type(error).__name__}): see Ray's logs."
        if done.trace:
            _append(folder / "logs" / "ray.log", f"{job.name}\n{done.trace}\n".encode())
        if done.records is not None:
            write_once(folder / job.results, done.records)
        return done.failure


@dataclass(frozen=True)
class _Done:
    """What a worker hands back: records, or why there are none and the traceback of that."""

    records: bytes | None = None
    failure: str | None = None
    trace: str = ""


class _Post:
    """An actor that keeps the pieces of the jobs under way, and hands new ones to the driver.

    Pieces are whole lines, by the path of their job's records.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[bytes]] = {}
        self._new: list[tuple[str, bytes]] = []
        self._said: dict[str, tuple[str, int, int]] = {}

    def add(self, job: str, lines: bytes, who: str, said: tuple[str, int, int]) -> None:
        """Take the pieces that a worker has finished, and what it does now."""
        if lines:
            self._kept.setdefault(job, []).append(lines)
            self._new.append((job, lines))
        self._said[who] = said

    def kept(self, job: str) -> bytes:
        """All pieces of a job that came here."""
        return b"".join(self._kept.get(job, ()))

    def collect(self) -> tuple[list[tuple[str, bytes]], dict[str, tuple[str, int, int]]]:
        """What came since the last time: pieces, and what each worker does."""
        news = self._new, self._said
        self._new, self._said = [], {}
        return news

    def forget(self, job: str) -> None:
        """Let the pieces of an ended job go."""
        self._kept.pop(job, None)


def _files(job: Job, folder: Path) -> Files:
    """What a worker needs of the sweep's folder: the plan, and the pieces of a job that was cut."""
    Ledger(pieces_path(folder / job.results))  # drops a last line that was cut short
    names = [pieces_path(job.results)]
    if job.plan_file is not None:
        names.append(job.plan_file)
        if tensors := Plan.load(folder / job.plan_file).tensors:
            names.append(job.plan_file.with_name(tensors.file))
    return {str(name): (folder / name).read_bytes() for name in names if (folder / name).exists()}


def _perform(job: Job, files: Files, post: Any) -> _Done:
    """Do a job in a folder of its own, on a worker."""
    import ray

    with tempfile.TemporaryDirectory(prefix="kvloom-") as name:
        folder = Path(name)
        for path, content in files.items():
            _append(folder / path, content)
        results = folder / job.results
        _append(pieces_path(results), ray.get(post.kept.remote(str(job.results))))
        sender = _Sender(job, pieces_path(results), post)
        try:
            Performer(folder).perform(job, sender.progress)
        except Exception as error:
            return _Done(failure=why(error), trace=traceback.format_exc())
        finally:
            ray.get(sender.send(("", 0, 0)))
        return _Done(results.read_bytes() if results.exists() else None)


class _Sender:
    """Sends the pieces of a job as they are finished.

    Args:
        job: the job.
        pieces: their file, in which those of earlier workers are already.
        post: the actor they go to.
    """

    def __init__(self, job: Job, pieces: Path, post: Any) -> None:
        import ray

        self._job = job
        self._pieces = pieces
        self._post = post
        self._sent = pieces.stat().st_size
        self._who = f"{ray.util.get_node_ip_address()}:{os.getpid()}"

    def progress(self, what: str, done: int, total: int) -> None:
        """Send what is new."""
        self.send((f"{self._job.name}: {what}", done, total))

    def send(self, said: tuple[str, int, int]) -> Any:
        """Send what is new, which is whole lines, and what comes next."""
        with self._pieces.open("rb") as file:
            file.seek(self._sent)
            lines = file.read()
        self._sent += len(lines)
        return self._post.add.remote(str(self._job.results), lines, self._who, said)


def _write_down(
    news: tuple[list[tuple[str, bytes]], dict[str, tuple[str, int, int]]], folder: Path, watch: Watch
) -> None:
    pieces, said = news
    for job, lines in pieces:
        _append(pieces_path(folder / job), lines)
    for who, (what, done, total) in said.items():
        watch(who, what, done, total)


def _append(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as opened:
        opened.write(content)
