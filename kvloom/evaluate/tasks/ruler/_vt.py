"""Variable tracking: which variables hold a value, through a chain of assignments."""

from __future__ import annotations

from functools import partial
from random import Random
from string import ascii_uppercase
from typing import Any

from kvloom.evaluate.tasks.ruler._fit import Fitter
from kvloom.evaluate.tasks.ruler._niah import inserted, noise_lines
from kvloom.evaluate.tasks.ruler._sub_task import Draft, SubTask

_HOPS = 4
_EXAMPLE_TOKENS = 500
_QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
_OPENING = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)


class VariableTracking(SubTask):
    """One chain of four hops in noise, after a worked example of at most 500 tokens."""

    name = "vt"
    new_tokens = 30

    def draft(self, random: Random, index: int, room: int, tokenizer: Any) -> Draft:
        """See `SubTask.draft`; a unit is a sentence."""
        example = _Chain(random, letters=3)
        fitter = Fitter("The example of ruler/vt", _EXAMPLE_TOKENS)
        fitter.fill(partial(_tokens, tokenizer, example), least=_HOPS + 1)
        shown = f"{example.question(fitter.units)}{example.opening} {' '.join(example.names)}\n\n"
        chain = _Chain(random, letters=5)
        return Draft(lambda units: shown + chain.question(units), chain.opening, chain.names, least=_HOPS + 1)


def _tokens(tokenizer: Any, chain: _Chain, units: int) -> list[int]:
    ids: list[int] = tokenizer(chain.question(units) + chain.opening, add_special_tokens=False).input_ids
    return ids


class _Chain:
    """Variables, each assigned the one before it, and the value of the first."""

    def __init__(self, random: Random, letters: int) -> None:
        names: dict[str, None] = {}
        while len(names) <= _HOPS:
            names["".join(random.choices(ascii_uppercase, k=letters))] = None
        self.names = list(names)
        self._value = random.randrange(10000, 99999)
        self._places = sorted(random.random() for _ in names)

    @property
    def opening(self) -> str:
        return _OPENING.format(count=len(self.names), value=self._value)

    def question(self, units: int) -> str:
        hops = [f"VAR {name} = VAR {before} " for before, name in zip(self.names, self.names[1:], strict=False)]
        lines = inserted(noise_lines(units), [f"VAR {self.names[0]} = {self._value}", *hops], self._places)
        return _QUESTION.format(context="\n".join(lines), value=self._value)
