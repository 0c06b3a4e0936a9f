"""What a task is, and the registry that finds one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom._ledger import Record
from kvloom._names import unknown
from kvloom.errors import DataError, MissingExtraError
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._context import Progress
from kvloom.evaluate.tasks._settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Bench:
    """Who is measured, and where results go.

    Attributes:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        contestants: whose caches.
        name: of the model in the records; None for the last part of its path.
        out: results file; None writes none.
        progress: told before every piece of work.
        batch: prompts of one length that are answered together; see `ask`.
    """

    model: PreTrainedModel
    tokenizer: Any
    contestants: Sequence[Contestant]
    name: str | None
    out: Path | None
    progress: Progress
    batch: int = 1


class Task(ABC):
    """Something that caches are scored on, with its data.

    Attributes:
        name: what the registry and the records call it; a name with a slash belongs to the group before it.
        tokens: that a model must read, as far as the settings say.
    """

    name: str
    tokens: int = 0

    @abstractmethod
    def run(self, bench: Bench) -> list[Record]:
        """One record for each contestant; finished pieces of work are kept beside the results file.

        Raises:
            DataError: the task does not fit the model.
        """


Maker = Callable[[Settings], Sequence[Task]]


@dataclass(frozen=True)
class Chosen:
    """Tasks that can run here, and a sentence on each member of a group that cannot."""

    tasks: tuple[Task, ...]
    notes: tuple[str, ...]


_MAKERS: dict[str, Maker] = {}


def register(name: str, maker: Maker) -> None:
    """Make a task known; `maker` gives it for every length that the settings ask for."""
    _MAKERS[name] = maker


def task_names() -> tuple[str, ...]:
    """Names of all tasks."""
    return tuple(sorted(_MAKERS))


def choose(names: Iterable[str], settings: Settings) -> Chosen:
    """Make tasks, with their data.

    Args:
        names: of tasks, or of groups: `ruler` stands for every `ruler/...`.
        settings: what they are made with.

    Raises:
        DataError: a name is unknown, or a task's data is not here. Members of a group whose data is missing are left
            out with a note, unless all are.
        MissingExtraError: a task needs a package that is not installed.
    """
    tasks: list[Task] = []
    notes: list[str] = []
    for name in names:
        if name in _MAKERS:
            tasks += _MAKERS[name](settings)
            continue
        made, missing = _group(name, settings)
        tasks += made
        notes += [f"{member} is left out: {error}" for member, error in missing.items()]
    return Chosen(tuple(tasks), tuple(notes))


def _group(name: str, settings: Settings) -> tuple[list[Task], Mapping[str, Exception]]:
    members = [member for member in task_names() if member.startswith(f"{name}/")]
    if not members:
        raise DataError(unknown("task", name, _shown(name), listing="kvloom.evaluate.task_names()", also=task_names()))
    made: list[Task] = []
    missing: dict[str, Exception] = {}
    for member in members:
        try:
            made += _MAKERS[member](settings)
        except (DataError, MissingExtraError) as error:
            missing[member] = error
    if not made:
        raise next(iter(missing.values()))
    return made, missing


def _shown(strange: str) -> list[str]:
    """Tasks and groups, a group in place of its members; but the members of the group that is named."""
    members = [name for name in task_names() if name.startswith(f"{strange.partition('/')[0]}/")]
    return members or list(dict.fromkeys(name.partition("/")[0] for name in task_names()))
