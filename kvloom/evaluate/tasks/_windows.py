"""Fidelity and drift as tasks: windows of text, scored token by token."""

from __future__ import annotations

from typing import Literal

from kvloom._ledger import Record
from kvloom.assets import Text, texts, token_windows
from kvloom.evaluate._drift import drift
from kvloom.evaluate._fidelity import Protocol, fidelity
from kvloom.evaluate.tasks._base import Bench, Task, register
from kvloom.evaluate.tasks._settings import Settings


class Windows(Task):
    """Windows of the joined texts, as `kvloom.assets.token_windows` cuts them.

    Args:
        name: what scores them.
        settings: windows, window, chunk, texts and seed.
    """

    def __init__(self, name: Literal["fidelity", "drift"], settings: Settings) -> None:
        self.name = name
        self._measure = fidelity if name == "fidelity" else drift
        self._settings = settings
        self._texts: list[Text] = texts(settings.texts)

    def run(self, bench: Bench) -> list[Record]:
        """See `fidelity` and `drift`."""
        it = self._settings
        windows = token_windows(bench.tokenizer, self._texts, it.window, it.windows, it.seed)
        return self._measure(
            bench.model,
            windows,
            bench.contestants,
            protocol=Protocol(chunk=it.chunk),
            texts=[text.name for text in self._texts],
            name=bench.name,
            out=bench.out,
            progress=bench.progress,
        )


register("fidelity", lambda settings: [Windows("fidelity", settings)])
register("drift", lambda settings: [Windows("drift", settings)])
