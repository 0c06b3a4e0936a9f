"""What is generated: prompt lengths and batches, and the settings of published measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvloom._names import unknown
from kvloom.bench._grid import Shape, tokens_of, words
from kvloom.errors import DataError, PlanError

_LOAD = re.compile(r"B(\d+|\*)x(.+)")


@dataclass(frozen=True)
class Load:
    """Sequences, and tokens of each one's prompt.

    Attributes:
        batch: Sequences; None for as many as fit, which each cache decides for itself.
        tokens: Tokens of a prompt.
    """

    batch: int | None
    tokens: int

    @property
    def label(self) -> str:
        """As on the command line: ``B8x32K``, ``B*x32K``."""
        return Shape(self.batch or 0, self.tokens).label.replace("B0", "B*")


@dataclass(frozen=True)
class Preset:
    """A published setting.

    Attributes:
        shape: The model's shape, a key of `kvloom.assets.SHAPES`.
        loads: As `make_loads` reads them.
        new_tokens: Generated tokens.
        source: Where it is published, and what it leaves open.
    """

    shape: str
    loads: str
    new_tokens: int
    source: str


PRESETS = {
    "kivi": Preset("llama-2-7b", "B96x160,B*x160", 338, "KIVI's repository, mem_spd_test.py (arXiv 2402.02750)"),
    "kvmix": Preset(
        "llama-2-7b",
        "B4x688,B*x688",
        1024,
        "KVmix (arXiv 2506.08018): memory at a batch of 4, throughput at each cache's largest batch",
    ),
    "kvtuner": Preset(
        "llama-3.1-8b",
        "B64x128,B16x512,B8x1K",
        128,
        "KVTuner (arXiv 2502.04420), which does not say how many tokens it generates: 128 here",
    ),
}


def make_preset(name: str) -> Preset:
    """A published setting by name.

    Raises:
        PlanError: There is no such preset.
    """
    if name not in PRESETS:
        raise PlanError(unknown("--preset", name, PRESETS))
    return PRESETS[name]


def make_loads(text: str) -> tuple[Load, ...]:
    """Read ``B1x8K,B*x32K``: batch (``*``: the largest that fits) and prompt tokens, K = 1024; each once.

    Raises:
        PlanError: A word cannot be read, or a number is 0.
    """
    return tuple(_load(word) for word in words(text))


def check_loads(loads: Sequence[Load], device: torch.device) -> None:
    """Refuse the largest batch where there is no way to find it.

    Raises:
        DataError: It is asked for on a CPU.
    """
    if device.type != "cuda" and any(load.batch is None for load in loads):
        raise DataError("the largest batch (B*) is found by running out of a GPU's memory: on a CPU give a number.")


def _load(word: str) -> Load:
    match = _LOAD.fullmatch(word)
    if match is None:
        raise PlanError(f"--shapes: cannot read {word!r}; give batch and prompt tokens as in B8x32K or B*x32K.")
    load = Load(None if match[1] == "*" else int(match[1]), tokens_of(word, match[2]))
    if load.batch == 0 or load.tokens == 0:
        raise PlanError(f"--shapes {word}: give a batch and a number of tokens above 0.")
    return load
