"""What a signal is, and the registry that finds one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvloom.errors import PlanError
from kvloom.pages import Format

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.cache import Rope
    from kvloom.signals._tap import Tapped

Labels = Literal["true", "sampled"]
"""Next tokens a backward pass starts from: the text's, or drawn from the model's own distribution."""

Side = Literal["key", "value"]


@dataclass(frozen=True)
class Evidence:
    """What one backward pass shows about the keys, or the values, of one layer.

    All gradients are those of the *sum* over scored tokens of -log p(next token), in nats.

    Attributes:
        side: Keys or values.
        scored: Scored tokens of each prompt, `[batch]`.
        attention: The layer's attention, with the gradient by its output.
        packed: Tokens that a cache would hold in full pages by the end of the prompt.
        inputs: What the projection reads, `[batch, tokens, hidden]`.
        output_gradient: Gradient by what the projection writes, `[batch, tokens, kv_heads * head_dim]`.
        formats: Candidate formats.
        rope: The model's rotary embedding, if a format is for keys before it.
    """

    side: Side
    scored: Tensor
    attention: Tapped
    packed: slice
    inputs: Tensor
    output_gradient: Tensor
    formats: Sequence[Format]
    rope: Rope | None


class Signal(ABC):
    """Says how much a layer's keys or values matter. Stateless; one file a method."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """Scores of each prompt, float32 `[batch, columns]`; the signal says what columns are."""


_SIGNALS: dict[str, Signal] = {}


def register(signal: Signal) -> Signal:
    """Makes a signal known by its name.

    Raises:
        ValueError: Another signal has that name.
    """
    if signal.name in _SIGNALS:
        raise ValueError(f"the signal name {signal.name!r} is taken; choose another.")
    _SIGNALS[signal.name] = signal
    return signal


def get(name: str) -> Signal:
    """The signal of that name.

    Raises:
        PlanError: There is none.
    """
    if name not in _SIGNALS:
        raise PlanError(f"signal {name!r} is unknown; choose one of {', '.join(sorted(_SIGNALS))}.")
    return _SIGNALS[name]
