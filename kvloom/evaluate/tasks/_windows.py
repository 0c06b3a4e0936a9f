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
        settings: windows, window, chunk, texts, seed and after_prompt.
    """

    def __init__(self, name: Literal["fidelity", "drift"], settings: Settings) -> None:
        self.name = name
        self._measure = fidelity if name == "fidelity" else drift
        self.tokens = settings.window
        self._settings = settings
        self._texts: list[Text] = texts(settings.texts)

    def run(self, bench: Bench) -> list[Record]:
        """See `fidelity` and `drift`; where a contestant evicts, all of a window but its last tokens is a prompt."""
        it = self._settings
        windows = token_windows(bench.tokenizer, self._texts, it.window, it.windows, it.seed)
        return self._measure(
            bench.model,
            windows,
            bench.contestants,
            protocol=self._protocol(it.after_prompt or any(contestant.evicts for contestant in bench.contestants)),
            texts=[text.name for text in self._texts],
            name=bench.name,
            out=bench.out,
            progress=bench.progress,
        )

    def _protocol(self, after_prompt: bool) -> Protocol:
        if not after_prompt:
            return Protocol(chunk=self._settings.chunk)
        block = Protocol.block
        return Protocol(chunk=1, unscored=max(1, self._settings.window - block - 1), prompt=True)


register("fidelity", lambda settings: [Windows("fidelity", settings)])
register("drift", lambda settings: [Windows("drift", settings)])
