"""Prompts as long as they may be."""

from __future__ import annotations

from collections.abc import Callable

from kvloom.errors import DataError


class Fitter:
    """Finds how much text fills a length, starting from where it ended the last time.

    Args:
        what: the task, for errors.
        room: tokens there are.

    Attributes:
        units: of text, in the last prompt.
    """

    def __init__(self, what: str, room: int) -> None:
        self.units = 0
        self._what = what
        self._room = room

    def fill(self, prompt: Callable[[int], list[int]], least: int) -> list[int]:
        """The longest prompt that has room; one more unit of text would be too many.

        Args:
            prompt: tokens of the prompt with so many units of text; more units, more tokens.
            least: units that it needs.

        Raises:
            DataError: the least prompt has no room.
        """
        made: dict[int, list[int]] = {}

        def fits(units: int) -> bool:
            made[units] = prompt(units)
            return len(made[units]) <= self._room

        low, high = _bracket(fits, max(self.units, least), least)
        if low < least:
            raise DataError(
                f"{self._what} has at least {len(made[least])} tokens of prompt, and there is room for {self._room}: "
                "give a greater length."
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        self.units = low
        return made[low]


def _bracket(fits: Callable[[int], bool], guess: int, least: int) -> tuple[int, int]:
    """Units that fit, and more that do not, in steps that double from a guess; less than `least` if none fit."""
    step = 1
    if fits(guess):
        while fits(guess + step):
            guess, step = guess + step, 2 * step
        return guess, guess + step
    while guess > least:
        lower = max(least, guess - step)
        if fits(lower):
            return lower, guess
        guess, step = lower, 2 * step
    return least - 1, least
