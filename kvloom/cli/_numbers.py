"""Options that are numbers."""

from __future__ import annotations

from typing import Any

import typer

from kvloom._sizes import parse_tokens
from kvloom.errors import PlanError


def tokens_option(about: str, *, least: int = 1) -> Any:
    """An option that is a number of tokens: 2048, 4K or 1M.

    Args:
        about: what the help says.
        least: the smallest number that means something.
    """

    def tokens(text: str | int) -> int:
        try:
            number = parse_tokens(text)
        except PlanError as error:
            raise typer.BadParameter(str(error)) from None
        if number < least:
            raise typer.BadParameter(f"{text} is too few: give at least {least}.")
        return number

    return typer.Option(parser=tokens, metavar="TOKENS", help=about)
