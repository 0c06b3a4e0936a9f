"""The time of every step of `generate`."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from kvloom.bench._timing import Timing, clock, summary


class StepTimes(LogitsProcessor):
    """Times ``generate(..., logits_processor=[StepTimes(device)])``, from when it is made; changes no logits.

    A step lasts from the logits of one token to those of the next: the host's work between them counts.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._watch = clock(device).stopwatch()
        self._watch.mark()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Set a mark; see `LogitsProcessor`."""
        self._watch.mark()
        return scores

    def first(self) -> float:
        """Seconds to the first token's logits: the prompt's pass."""
        return self._watch.laps()[0]

    def steps(self) -> list[float]:
        """Seconds of every decode step."""
        return self._watch.laps()[1:]

    def timing(self, steps: list[float]) -> Timing:
        """Median and spread of steps in seconds."""
        return summary(steps, self._watch.method)
