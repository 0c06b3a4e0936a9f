"""The application: its commands, and how errors are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvloom import __version__
from kvloom.cli import (
    _assets,
    _bench,
    _calibrate,
    _doctor,
    _evaluate,
    _fit,
    _plan,
    _profile,
    _report,
    _run,
    _search,
    _signals,
    _sweep,
)
from kvloom.errors import EXPECTED


class _Group(TyperGroup):
    """Shows an expected error as one line; `--debug` lets it through with its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="kvloom",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how much each layer's keys and values matter, plan their precision under a "
    "memory budget, run the plan, prove what it cost.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    del version, debug  # read by their callback and by _Group


for command in (
    _assets.fetch,
    _doctor.doctor,
    _profile.profile,
    _plan.plan,
    _search.search,
    _calibrate.calibrate,
    _plan.convert,
    _plan.show,
    _plan.schema,
    _fit.fit,
    _run.generate,
    _evaluate.evaluate,
    _evaluate.lm_eval,
    _sweep.sweep,
    _report.report,
    _report.explore,
    _evaluate.demo,
):
    app.command(name="eval" if command is _evaluate.evaluate else None)(command)
app.add_typer(_bench.app, name="bench")
app.add_typer(_signals.app, name="signals")
