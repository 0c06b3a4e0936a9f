"""`kvloom sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli._terminal import err, many_bars, without_bars
from kvloom.errors import DataError

if TYPE_CHECKING:
    from kvloom.sweep import Runner


def sweep(
    file: Annotated[Path, typer.Argument(help="Models, plans and tasks, in YAML.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of results; runs/FILE.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="On this machine; by default one for each GPU, or one on a CPU.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local to start one.")] = None,
) -> None:
    """Score models x plans on tasks, one process a GPU; a killed run goes on where it stopped."""
    from kvloom.report import render_text
    from kvloom.sweep import Sweep, make_jobs
    from kvloom.sweep import sweep as run_sweep

    runner, folder = _runner(processes, ray), output or Path("runs") / file.stem
    without_bars()
    with err.status("checking models, plans and tasks"):
        jobs = make_jobs(Sweep.load(file))
    for note in jobs.notes:
        err.print(note)
    with many_bars() as watch:
        swept = run_sweep(jobs, folder, runner=runner, watch=watch)
    for model, records in swept.records.items():
        typer.echo(f"{model}\n\n{render_text(records)}\n")
    typer.echo(f"wrote {folder}")
    for job, reason in swept.failures.items():
        err.print(f"failed: {job}: {reason}", soft_wrap=True)
    if swept.failures:
        raise typer.Exit(1)


def _runner(processes: int | None, ray: str | None) -> Runner:
    if ray is None:
        from kvloom.sweep import Processes

        return Processes(processes)
    if processes is not None:
        raise DataError("--processes is of this machine, and --ray says how many jobs run at once: give one of them.")
    from kvloom.integrations.ray import Ray

    return Ray(ray)
