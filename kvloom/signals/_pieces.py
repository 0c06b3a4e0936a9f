"""Finished pieces of a measurement, kept beside its output, so that a killed run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom._conditions import conditions, own_code_hash
from kvloom._ledger import Ledger, Record, fingerprint, pack_floats, pieces_path, unpack_floats

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CODE = ("cache/_rope.py", "codecs", "eviction", "pages", "plan", "signals")


class Pieces:
    """Tensors that are computed once.

    Args:
        out: The measurement's output file, or None: pieces are not kept.
        model: What is measured.
        about: What else all pieces depend on, in JSON types.
        made_by: Signals, codecs or policies behind them: pieces of other code are not taken, and none are kept of code
            without a file.

    Attributes:
        seconds: Time that all pieces asked for took, in this run or in an earlier one.
    """

    def __init__(self, out: Path | None, model: PreTrainedModel, about: Record, made_by: Iterable[object]) -> None:
        self.seconds = 0.0
        own_code = own_code_hash(made_by)
        self._ledger = Ledger(pieces_path(out)) if out and own_code else None
        self._about = {**conditions(model, _CODE), "own_code": own_code, **about} if self._ledger else {}

    def get(self, of: Record, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A piece: float32 tensors on the CPU by name.

        Args:
            of: What tells this piece from others, in JSON types.
            make: Computes it.
        """
        key = fingerprint({**self._about, **of}) if self._ledger else ""
        if self._ledger and key in self._ledger:
            piece = self._ledger[key]
            self.seconds += piece["seconds"]
            return {name: _read(entry) for name, entry in piece["tensors"].items()}
        started = time.perf_counter()
        made = make()
        seconds = round(time.perf_counter() - started, 3)
        self.seconds += seconds
        if self._ledger:
            tensors = {name: _written(tensor) for name, tensor in made.items()}
            self._ledger.add("profile_piece", key, {"seconds": seconds, "tensors": tensors})
        return made


def _written(tensor: Tensor) -> Record:
    return {"shape": list(tensor.shape), "data": pack_floats(tensor)}


def _read(entry: Record) -> Tensor:
    shape = [int(size) for size in entry["shape"]]
    return unpack_floats(entry["data"]).view(shape) if math.prod(shape) else unpack_floats("").view(shape)
