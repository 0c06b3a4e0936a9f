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
        low, high, units = least - 1, None, max(self.units, least)
        while high is None or high - low > 1:
            made[units] = prompt(units)
            if len(made[units]) <= self._room:
                low = units
            else:
                high = units
            wanted = max(low + 1, units + self._step(units, len(made[units])))
            units = wanted if high is None else min(wanted, high - 1)
        if low < least:
            raise DataError(
                f"{self._what} has at least {len(made[least])} tokens of prompt, and there is room for {self._room}: "
                "give a greater length."
            )
        self.units = low
        return made[low]

    def _step(self, units: int, tokens: int) -> int:
        """Units to add to a prompt of so many tokens, or to take away, if all have as many as those it has."""
        step = (self._room - tokens) * units // max(tokens, 1)
        return max(step, 1) if tokens <= self._room else min(step, -1)
