"""Jobs: one model, one plan or none, one task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from kvloom import Plan
from kvloom._conditions import code_hash
from kvloom._ledger import fingerprint
from kvloom.sweep._config import AnyTask, Entry, LmEvalEntry, ModelEntry

DENSE = "dense"
"""The uncompressed cache's name."""

_CODE = (
    *("assets", "cache", "codecs", "evaluate", "eviction", "generation", "integrations", "kernels", "pages", "plan"),
    "sweep",
)


class Job(Entry):
    """One cache of one model on one task.

    Attributes:
        model: the model.
        plan: name of the plan, which lies in the sweep's folder; None for the uncompressed cache.
        task: a single task, at all its lengths.
        prefill: what prompts attend to; None leaves it to the plan.
    """

    model: ModelEntry
    plan: str | None
    task: AnyTask
    prefill: Literal["quantized", "exact"] | None

    @property
    def name(self) -> str:
        """Model, task and plan in words."""
        return f"{self.model.label}, {self.task.label}, {self.plan or DENSE}"

    @property
    def results(self) -> Path:
        """Where its records lie in the sweep's folder."""
        return Path(
            "results", as_file(self.model.label), as_file(self.task.label), f"{as_file(self.plan or DENSE)}.jsonl"
        )

    @property
    def plan_file(self) -> Path | None:
        """Where its plan lies in the sweep's folder."""
        return None if self.plan is None else plan_file(self.model, self.plan)

    def key(self, plan: Plan | None) -> str:
        """Fingerprint of all that the records depend on: whoever has finished it need not do it again.

        Args:
            plan: the plan of that name.
        """
        stored = plan and plan.model_dump(mode="json", exclude={"provenance"})
        versions = [code_hash(_CODE), torch.__version__, transformers.__version__]
        return fingerprint([self.model_dump(mode="json"), stored, versions, list(map(_stamp, self._files))])

    @property
    def _files(self) -> Iterator[Path]:
        """Files and folders that the job reads, other than its plan."""
        yield Path(self.model.model).expanduser()
        if isinstance(self.task, LmEvalEntry):
            yield from filter(None, [self.task.include])
        else:
            yield from filter(None, [self.task.data, *map(Path, self.task.texts)])


def plan_file(model: ModelEntry, plan: str) -> Path:
    """Where a plan lies in a sweep's folder."""
    return Path("plans", as_file(model.label), f"{as_file(plan)}.json")


def as_file(name: str) -> str:
    """A name as that of a file, which is never hidden and never another folder."""
    return re.sub(r"[^\w.+-]+", "-", name).lstrip(".") or "-"


def _stamp(path: Path) -> list[Any]:
    """Name, size and time of a file, or of all files of a folder; nothing if there is none."""
    files: Iterable[Path] = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file.relative_to(path)), state.st_size, state.st_mtime_ns] for file, state in found]
