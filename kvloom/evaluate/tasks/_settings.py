"""What the tasks of one run are made with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvloom.assets import EVALUATION
from kvloom.errors import DataError


@dataclass(frozen=True)
class Settings:
    """What the tasks of one run are made with.

    Attributes:
        limit: at most so many cases of each task; None for its published number, or all of its data.
        lengths: tokens of prompt and answer together, for tasks of any length; LongBench's prompts are cut to the first
            one. None for each task's own.
        shots: examples in a GSM8K prompt; None for the published number.
        windows: text windows of fidelity and drift; None for all that the texts hold.
        window: tokens of each of them.
        chunk: tokens of one forward pass in fidelity and drift.
        texts: what windows and haystacks are cut from, as `kvloom.assets.texts` reads them.
        data: folder of local data sets, laid out as `kvloom.assets.rows` says; None for those of the hub.
        seed: of everything drawn.
        after_prompt: windows of fidelity and drift are scored after a prompt, as wherever a contestant evicts: so that
            others can be compared with one that is scored elsewhere.
    """

    limit: int | None = None
    lengths: tuple[int, ...] | None = None
    shots: int | None = None
    windows: int | None = 8
    window: int = 2048
    chunk: int = 128
    texts: tuple[str, ...] = EVALUATION
    data: Path | None = None
    seed: int = 0
    after_prompt: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "shots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}: give at least 1, or leave it out.")
        if self.lengths is not None and min(self.lengths, default=0) < 2:
            raise DataError(f"lengths is {list(self.lengths)}: give at least one length, each of at least 2 tokens.")
