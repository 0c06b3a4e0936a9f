"""English words to make keys and lists of: those of the package `wonderwords`, as RULER takes them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from random import Random

from kvloom._extras import require

_KINDS = ("noun", "adjective", "verb")


def check_words() -> None:
    """Look for the words.

    Raises:
        MissingExtraError: the `tasks` extra is not installed.
    """
    require("tasks", "A list of English words")


@cache
def single_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, each once, in alphabetical order."""
    return tuple(sorted({word for kind in _KINDS for word in _listed(kind)}))


def word_pair(random: Random) -> str:
    """An adjective and a noun, joined by a hyphen."""
    return f"{random.choice(_listed('adjective'))}-{random.choice(_listed('noun'))}"


@cache
def _listed(kind: str) -> tuple[str, ...]:
    text = files("wonderwords").joinpath("assets", f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.split("\n") if line.strip())
