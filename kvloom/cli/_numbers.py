"""Options that are numbers; senseless ones are refused before anything is looked for."""

from __future__ import annotations

import math
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


def count_option(about: str, *, least: int = 1) -> Any:
    """An option that is a number of things.

    Args:
        about: what the help says.
        least: the smallest number that means something.
    """
    return typer.Option(min=least, help=about)


def amount_option(about: str) -> Any:
    """An option that is a finite number above 0."""

    def number(text: str | float) -> float:
        try:
            amount = float(text)
        except ValueError:
            raise typer.BadParameter(f"cannot read {text!r}: give a number.") from None
        if not 0 < amount < math.inf:
            raise typer.BadParameter(f"{text} is no amount: give a finite number above 0.")
        return amount

    return typer.Option(parser=number, metavar="NUMBER", help=about)
