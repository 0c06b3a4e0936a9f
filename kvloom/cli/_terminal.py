"""What commands share: options, loading with a spinner, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from kvloom import Plan

err = Console(stderr=True, highlight=False, markup=False)

Model = Annotated[str, typer.Argument(help="smollm2-135m (packaged), a local folder, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the first GPU if there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, ...; on a CPU float32, elsewhere the checkpoint's own."),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Essay name, .txt or .jsonl file; give it again for more."),
]
Seed = Annotated[int, typer.Option(help="Of the choice of text windows.")]
Windows = Annotated[int, typer.Option(help="Text windows to score.")]
Window = Annotated[int, typer.Option(help="Tokens in each window.")]
AtOnce = Annotated[int, typer.Option(help="Windows in one forward pass; more are faster on a GPU.")]


def without_bars() -> None:
    """Switch off transformers' own progress bars: the command shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(model: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """`kvloom.load_model` with a spinner."""
    from kvloom import load_model

    without_bars()
    with err.status(f"loading {model}"):
        return load_model(model, device=device, dtype=dtype)


def calibration(
    model: str, text: list[str] | None, prompts: int, tokens: int, seed: int, device: str | None, dtype: str | None
) -> tuple[Any, Any, list[str]]:
    """A model, prompts ``[prompts, tokens]`` of calibration texts, and the texts' names."""
    from kvloom.assets import CALIBRATION, texts, token_windows

    sources = texts(text or CALIBRATION)
    loaded, tokenizer = load(model, device, dtype)
    return loaded, token_windows(tokenizer, sources, tokens, prompts, seed), [source.name for source in sources]


def meter(
    model: str, windows: int, window: int, at_once: int, text: list[str] | None, seed: int, device: str | None
) -> Callable[[Plan], dict[str, float]]:
    """`kvloom.evaluate.kld_meter` of a model in fp32, on texts to score on, with a bar for each plan."""
    from kvloom.assets import EVALUATION, texts, token_windows
    from kvloom.evaluate import kld_meter

    sources = texts(text or EVALUATION)
    loaded, tokenizer = load(model, device, "float32")
    rows = token_windows(tokenizer, sources, window, windows, seed)

    def measure(plan: Plan) -> dict[str, float]:
        with progress() as update:
            return kld_meter(loaded, rows, batch=at_once, progress=update)(plan)

    return measure


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, and the `(what, done, total)` callback that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(bar, description=what, completed=done, total=total or None)
