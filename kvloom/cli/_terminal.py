"""What commands share: options, loading with a spinner, a progress bar, tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as Drawn
from rich.text import Text

from kvloom.cli._numbers import count_option, tokens_option
from kvloom.cli._processes import speaks
from kvloom.errors import DataError, ModelError, PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom import Plan, Profile
    from kvloom.bench import Table

_PIPE_WIDTH = 120

err = Console(stderr=True, highlight=False, markup=False, quiet=not speaks())

Model = Annotated[str, typer.Argument(help="smollm2-135m (packaged), a local folder, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the first GPU if there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float16, bfloat16 or float32; on a CPU float32, elsewhere the checkpoint's own."),
]
OptionalModel = Annotated[str | None, typer.Argument(help="As for the other commands; or give --shape.")]
Shape = Annotated[
    str | None, typer.Option("--shape", help="llama-3.1-8b or llama-2-7b with random weights, in place of MODEL.")
]
Plans = Annotated[
    list[str] | None,
    typer.Option("--plan", help="A kv_plan.json or a preset such as kvloom/K4V4; give it again for more."),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Essay name, .txt or .jsonl file; give it again for more."),
]
Results = Annotated[Path, typer.Option("--output", "-o", help="Results file; the same cases are replaced.")]
Seed = Annotated[int, typer.Option(help="Of the choice of text windows.")]
Windows = Annotated[int, count_option("Text windows to score.")]
Window = Annotated[int, tokens_option("Tokens in each window.")]
AtOnce = Annotated[int, count_option("Windows in one forward pass; more are faster on a GPU.")]


def without_bars() -> None:
    """Switch off transformers' own progress bars: the command shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def output_file(path: Path) -> None:
    """Make the folder of an output before any work that would be lost if it could not be written.

    Raises:
        DataError: the output is a folder, or cannot be written.
    """
    if path.is_dir():
        raise DataError(f"the output {path} is a folder: name a file.")
    output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise DataError(f"the output {path} cannot be written: name another file.")


def output_folder(path: Path) -> None:
    """Make the folder of outputs before any work that would be lost if they could not be written.

    Raises:
        DataError: a file is in the way, or the folder cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {path} cannot be made ({error.strerror}): name another one.") from None
    if not os.access(path, os.W_OK):
        raise DataError(f"the folder {path} cannot be written to: name one of yours.")


def load(model: str, device: Any, dtype: Any, *, sharded: bool = False) -> tuple[Any, Any]:
    """`kvloom.load_model` with a spinner; `sharded` in commands that several processes run together.

    Raises:
        ModelError: torchrun has started several processes, and this command runs in one.
    """
    from kvloom import load_model
    from kvloom.assets import started_processes

    if started_processes() > 1 and not sharded:
        raise ModelError(
            "this command runs in one process: start it without torchrun, which is for kvloom generate, eval and bench "
            "generate."
        )
    without_bars()
    with err.status(f"loading {model}"):
        return load_model(model, device=device, dtype=dtype, sharded=sharded)


def config_of(model: str | None, shape: str | None) -> Any:
    """The configuration of a model or of a shape.

    Raises:
        ModelError: there is not exactly one of them, or it is not found.
    """
    from kvloom.assets import load_config, shape_config

    if shape is not None and model is None:
        return shape_config(shape)
    if model is not None and shape is None:
        return load_config(model)
    raise ModelError("give a model or --shape, and not both.")


def check_reading(model: str, **tokens: int) -> None:
    """Refuse texts longer than a model reads, before it is loaded.

    Args:
        model: as `load` takes it.
        tokens: of each text, by what asks for them.

    Raises:
        DataError: a text is longer than the configuration says that the model reads.
    """
    from kvloom.evaluate import reads_at_most

    reads = reads_at_most(config_of(model, None))
    for what, wanted in tokens.items():
        if reads and wanted > reads:
            raise DataError(f"{what} takes {wanted} tokens, and {model} reads {reads}: give fewer.")


def load_or_make(model: str | None, shape: str | None, device: Any, dtype: Any, *, sharded: bool = False) -> Any:
    """A model by name, or one of a shape with random weights in bf16, on a CPU in fp32, unless `dtype` is given.

    Args:
        model: as `load` takes it.
        shape: as `kvloom.assets.random_model` takes it.
        device: the device; several processes take theirs of the same kind.
        dtype: of the weights.
        sharded: as `load` takes it.
    """
    import torch

    from kvloom.assets import random_model, started_processes

    if model is not None:
        return load(model, device if started_processes() == 1 else device.type, dtype, sharded=sharded)[0]
    assert shape is not None
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    with err.status(f"making {shape}"):
        return random_model(shape, dtype=dtype or usual, device=device, sharded=sharded)


def named_plan(word: str, model: Any) -> tuple[str, Plan]:
    """A plan that `model`, as yet a configuration, can have, and its name.

    Raises:
        PlanError: the file cannot be read, or there is no such preset.
        ModelError: the plan is for another model.
    """
    from kvloom.plan import Fingerprint, find_plan

    name, plan = find_plan(word, model)
    try:
        plan.model.check(Fingerprint.of_any(model))
    except ModelError as error:
        raise ModelError(f"--plan {word}: {error}") from None
    return name, plan


def named_plans(words: list[str] | None, model: Any) -> dict[str, Plan]:
    """Plans by the stem of their file, or by the name of the preset that `model` is given.

    Raises:
        PlanError: a file cannot be read, there is no such preset, or two plans have one name.
        ModelError: a plan is for another model.
    """
    found: dict[str, Plan] = {}
    for word in words or ():
        name, plan = named_plan(word, model)
        if name in found:
            raise PlanError(f"--plan {word}: another plan is named {name!r}; rename one of the files.")
        found[name] = plan
    return found


def print_tables(made: list[Table]) -> None:
    """Tables of text on stdout, wide enough for a pipe."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and console.width == 80:  # what rich takes a pipe for
        console.width = _PIPE_WIDTH
    for table in made:
        drawn = Drawn(title=Text(table.title), title_justify="left", box=None, pad_edge=False)
        for index, heading in enumerate(table.headings):
            drawn.add_column(Text(heading), justify="left" if index < table.numbers_from else "right")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn, *table.notes, "", sep="\n")


def calibration(model: str, text: list[str] | None, seed: int) -> tuple[Callable[[int, int], Tensor], list[str]]:
    """What makes so many prompts of so many tokens of calibration texts for a model, and the texts' names."""
    from kvloom.assets import CALIBRATION, load_tokenizer, texts, token_windows

    sources, tokenizer = texts(text or CALIBRATION), load_tokenizer(model)

    def prompts_of(prompts: int, tokens: int) -> Tensor:
        return token_windows(tokenizer, sources, tokens, prompts, seed)

    return prompts_of, [source.name for source in sources]


def meter(
    profile: Profile,
    model: str,
    windows: int,
    window: int,
    at_once: int,
    text: list[str] | None,
    seed: int,
    device: str | None,
) -> Callable[[Plan], dict[str, float]]:
    """A `kvloom.evaluate.KldMeter` of the profiled model in fp32, on texts to score on, with a bar for each plan."""
    from kvloom.assets import EVALUATION, load_tokenizer, texts, token_windows
    from kvloom.evaluate import KldMeter
    from kvloom.plan import Fingerprint

    profile.model.check(Fingerprint.of(config_of(model, None)))
    check_reading(model, **{"--window": window})
    scored = token_windows(load_tokenizer(model), texts(text or EVALUATION), window, windows, seed)
    own = KldMeter(load(model, device, "float32")[0], scored, batch=at_once)

    def measure(plan: Plan) -> dict[str, float]:
        with progress() as update:
            return own(plan, update)

    return measure


@contextmanager
def many_bars() -> Iterator[Callable[[str, str, int, int], None]]:
    """Bars on stderr, one for each worker, and the `(who, what, done, total)` callback that moves them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bars:
        shown: dict[str, TaskID] = {}

        def update(who: str, what: str, done: int, total: int) -> None:
            if what:
                if who not in shown:
                    shown[who] = bars.add_task("", total=None)
                bars.update(shown[who], description=f"{who}: {what}", completed=done, total=total or None)
            elif who in shown:
                bars.remove_task(shown.pop(who))

        yield update


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, and the `(what, done, total)` callback that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(bar, description=what, completed=done, total=total or None)
