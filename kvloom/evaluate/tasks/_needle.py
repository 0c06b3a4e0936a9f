"""Needle in a haystack as a task."""

from __future__ import annotations

from kvloom._ledger import Record
from kvloom.assets import texts
from kvloom.evaluate._needle import DEPTHS, LENGTHS, NEW_TOKENS, SEEDS, needle, needle_cases
from kvloom.evaluate.tasks._base import Bench, Task, register
from kvloom.evaluate.tasks._settings import Settings


class Needle(Task):
    """A needle at every depth of every length, as many times as the limit has room for, and at least once.

    Args:
        settings: limit, lengths, texts and seed.
    """

    name = "needle"

    def __init__(self, settings: Settings) -> None:
        lengths = settings.lengths or LENGTHS
        times = len(SEEDS) if settings.limit is None else max(1, settings.limit // (len(lengths) * len(DEPTHS)))
        self._cases = needle_cases(lengths, seeds=range(settings.seed, settings.seed + times))
        self.tokens = max(case.tokens for case in self._cases) + NEW_TOKENS
        self._haystack = "\n".join(text.content for text in texts(settings.texts))

    def run(self, bench: Bench) -> list[Record]:
        """See `needle`."""
        return needle(
            bench.model,
            bench.tokenizer,
            self._haystack,
            bench.contestants,
            cases=self._cases,
            name=bench.name,
            out=bench.out,
            batch=bench.batch,
            progress=bench.progress,
        )


register(Needle.name, lambda settings: [Needle(settings)])
