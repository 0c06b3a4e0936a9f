"""Sweep files: models, plans and tasks, validated before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from kvloom._dtypes import dtype_name
from kvloom._sizes import parse_tokens
from kvloom.assets import EVALUATION, MODEL_NAME
from kvloom.errors import DataError
from kvloom.evaluate import Settings
from kvloom.plan import explain

MODEL = "{model}"
"""Stands for the model's name in the files of plans and profiles."""


Length = Annotated[int, BeforeValidator(parse_tokens)]
"""A number of tokens: 2048, 4K or 1M."""


class Entry(BaseModel):
    """A part of a sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelEntry(Entry):
    """A model.

    Attributes:
        model: as `kvloom.load_model` takes it.
        name: of the model in records, in folders and for `{model}`; by default the last part of `model`.
        dtype: of the weights; as `kvloom.load_model` chooses without it.
    """

    model: str
    name: str | None = None
    dtype: str | None = None

    @field_validator("dtype")
    @classmethod
    def _dtype_is_known(cls, dtype: str | None) -> str | None:
        return dtype and dtype_name(dtype)

    @property
    def label(self) -> str:
        """The name in folders."""
        return self.name or Path(self.model).name


class BudgetEntry(Entry):
    """A plan that is made before the sweep begins: the best one of a budget, by the exact solver.

    Attributes:
        bits: true bits that it may have.
        profile: of the model, made by `kvloom profile`.
        tokens: context length at which the budget holds.
        name: of the plan; by default "exact" and the bits.
    """

    bits: float = Field(gt=0)
    profile: str
    tokens: Length = 8192
    name: str | None = None

    @property
    def label(self) -> str:
        """The plan's name."""
        return self.name or f"exact {self.bits:g}"


class TaskEntry(Entry):
    """A task, or a group of them, with its settings.

    Attributes:
        task: as `kvloom.evaluate.choose` takes it.
        name: in folders, in place of `task`; tells apart what is there twice.
        limit: this and all that follow: see `kvloom.evaluate.Settings`.
    """

    task: str
    name: str | None = None
    limit: int | None = None
    lengths: tuple[Length, ...] | None = None
    shots: int | None = None
    windows: int | None = 8
    window: Length = 2048
    chunk: Length = 128
    texts: tuple[str, ...] = EVALUATION
    data: Path | None = None
    seed: int = 0
    after_prompt: bool = False

    @model_validator(mode="after")
    def _settings_hold(self) -> TaskEntry:
        _ = self.settings
        return self

    @property
    def settings(self) -> Settings:
        """What the task is made with."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @property
    def label(self) -> str:
        """The name in folders."""
        return self.name or self.task

    def member(self, task: str) -> TaskEntry:
        """One task of the group."""
        name = self.name and self.name + task.removeprefix(self.task)
        return self.model_copy(update={"task": task, "name": name})


class LmEvalEntry(Entry):
    """Tasks of lm-eval.

    Attributes:
        tasks: lm-eval's names of them; in a file the field is `lm-eval`.
        name: in folders, before the task's own; tells apart what is there twice.
        limit: at most so many cases of each.
        shots: examples in a prompt; each task's own number without it.
        include: a folder of more tasks.
        chat: put prompts in the chat template.
    """

    tasks: tuple[str, ...] = Field(alias="lm-eval", min_length=1)
    name: str = "lm-eval"
    limit: int | None = Field(default=None, gt=0)
    shots: int | None = Field(default=None, ge=0)
    include: Path | None = None
    chat: bool = False

    @property
    def label(self) -> str:
        """The name in folders."""
        return "/".join((self.name, *self.tasks))

    def member(self, task: str) -> LmEvalEntry:
        """One of the tasks."""
        return self.model_copy(update={"tasks": (task,)})


def _plan_kind(entry: Any) -> str:
    return "word" if isinstance(entry, str) else "budget"


def _task_kind(entry: Any) -> str:
    lm_eval = isinstance(entry, LmEvalEntry) or (isinstance(entry, Mapping) and "lm-eval" in entry)
    return "lm-eval" if lm_eval else "task"


PlanEntry = Annotated[
    Annotated[str, Tag("word")] | Annotated[BudgetEntry, Tag("budget")],
    Discriminator(_plan_kind),
]
AnyTask = Annotated[
    Annotated[TaskEntry, Tag("task")] | Annotated[LmEvalEntry, Tag("lm-eval")],
    Discriminator(_task_kind),
]


class Sweep(Entry):
    """Every plan, and the uncompressed cache, of every model on every task.

    Attributes:
        models: names, or entries.
        plans: files and presets, with `{model}` for the model's name, or entries of budgets.
        tasks: names, or entries.
        prefill: what prompts attend to: what the cache holds, their exact selves, or as each plan says.
    """

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    plans: tuple[PlanEntry, ...] = ()
    tasks: tuple[AnyTask, ...] = Field(min_length=1)
    prefill: Literal["quantized", "exact", "plan"] = "quantized"

    @field_validator("models", mode="before")
    @classmethod
    def _models_by_name(cls, entries: Any) -> Any:
        return _named(entries, "model")

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_by_name(cls, entries: Any) -> Any:
        return _named(entries, "task")

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep file, in YAML; the paths in it start at its folder.

        Raises:
            DataError: the file is missing, is not YAML, or a field is wrong; the message names the field.
        """
        import yaml

        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"The sweep {str(path)!r} cannot be read ({error.strerror}): check the path.") from None
        except (ValueError, yaml.YAMLError) as error:
            raise DataError(f"{path} is not YAML ({' '.join(str(error).split())}): write a sweep file.") from None
        try:
            return _from(path.parent.absolute(), cls.model_validate(data))
        except ValidationError as error:
            raise DataError(explain(error, str(path))) from None


def _named(entries: Any, field: str) -> Any:
    """Entries, a mere name standing for an entry of nothing else."""
    if not isinstance(entries, list | tuple):
        return entries
    return tuple({field: entry} if isinstance(entry, str) else entry for entry in entries)


def _from(folder: Path, sweep: Sweep) -> Sweep:
    """The sweep with all paths made absolute, from a folder."""
    models = [it.model_copy(update={"model": _model_from(folder, it.model)}) for it in sweep.models]
    plans = [_plan_from(folder, it) for it in sweep.plans]
    tasks = [_task_from(folder, it) for it in sweep.tasks]
    return sweep.model_copy(update={"models": tuple(models), "plans": tuple(plans), "tasks": tuple(tasks)})


def _model_from(folder: Path, model: str) -> str:
    path = folder / Path(model).expanduser()
    local = model.startswith((".", "/", "~")) or (path.is_dir() and model != MODEL_NAME)
    return str(path) if local else model


def _plan_from(folder: Path, entry: str | BudgetEntry) -> str | BudgetEntry:
    if isinstance(entry, BudgetEntry):
        return entry.model_copy(update={"profile": str(folder / entry.profile)})
    return str(folder / entry) if entry.endswith(".json") else entry


def _task_from(folder: Path, entry: TaskEntry | LmEvalEntry) -> TaskEntry | LmEvalEntry:
    if isinstance(entry, LmEvalEntry):
        return entry.model_copy(update={"include": entry.include and folder / entry.include})
    texts = tuple(str(folder / text) if Path(text).suffix else text for text in entry.texts)
    return entry.model_copy(update={"texts": texts, "data": entry.data and folder / entry.data})
