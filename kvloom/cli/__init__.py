"""The command line: `kvloom COMMAND`, a few lines over the public API for each command."""

from __future__ import annotations

import atexit
import sys

from kvloom._extras import require
from kvloom.errors import MissingExtraError

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors of kvloom are one line on stderr and exit code 2."""
    try:
        require("cli", "The kvloom command")
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from kvloom.cli._app import app
    from kvloom.cli._processes import hush, part

    hush()
    atexit.register(part)
    app()
