"""What a signal is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvloom.pages import Format

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvloom.cache import Rope
    from kvloom.plan import Fingerprint
    from kvloom.signals._measure import Meter
    from kvloom.signals._pieces import Pieces
    from kvloom.signals._prompts import Prompts
    from kvloom.signals._tap import Tapped

Labels = Literal["true", "sampled"]
"""Next tokens a backward pass starts from: the text's, or drawn from the model's own distribution."""

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")

Scores = dict[Side, "Tensor"]
"""Float32 `[batch, layers, heads, columns]` on the CPU of each side; one head stands for the whole layer."""


@dataclass(frozen=True)
class Evidence:
    """What one pass over prompts shows about the keys, or the values, of one layer.

    All gradients are those of the *sum* over scored tokens of -log p(next token), in nats; a signal without labels
    has none.

    Attributes:
        side: Keys or values.
        layer: Index of the layer.
        model: The model.
        shape: Its fingerprint.
        scored: Scored tokens of each prompt, `[batch]`.
        attention: The layer's attention, with the gradient by its output.
        packed: Tokens that a cache would hold in full pages by the end of the prompt.
        inputs: What the projection reads, `[batch, tokens, hidden]`; None without labels.
        output_gradient: Gradient by what the projection writes, `[batch, tokens, kv_heads * head_dim]`, or None.
        formats: Candidate formats.
        rope: The model's rotary embedding, if a format is for keys before it.
    """

    side: Side
    layer: int
    model: PreTrainedModel
    shape: Fingerprint
    scored: Tensor
    attention: Tapped
    packed: slice
    inputs: Tensor | None
    output_gradient: Tensor | None
    formats: Sequence[Format]
    rope: Rope | None

    @property
    def states(self) -> Tensor:
        """Keys or values as cached, `[batch, kv_heads, tokens, head_dim]`."""
        return self.attention.key if self.side == "key" else self.attention.value


class Signal(ABC):
    """Says what storing a layer's keys or values would cost. Stateless; one file a method.

    `kvloom.testing.check_signal` checks what is asked here: losses are finite, not negative and those of more bits not
    larger; they depend on the prompt alone, and the model is left as it was.
    """

    name: ClassVar[str]


class LayerSignal(Signal):
    """A signal that looks at one layer's keys or values at a time, in one pass over a prompt.

    Attributes:
        labels: Next tokens its backward pass starts from; None: it has no backward pass.
    """

    labels: ClassVar[Labels | None] = None

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """Predicted loss of each format, float32 `[batch, kv_heads or 1, formats]`; those of heads add up."""


class ModelSignal(Signal):
    """A signal that takes the whole model to measure."""

    @abstractmethod
    def steps(self, meter: Meter) -> int:
        """How often `measure` reports that it has come further."""

    @abstractmethod
    def measure(self, meter: Meter, prompts: Prompts, pieces: Pieces, step: Callable[[], None]) -> Scores:
        """Predicted losses of some prompts.

        Args:
            meter: The model, ready to be measured, and the candidate formats.
            prompts: What it reads.
            pieces: Where finished pieces are kept.
            step: Called `steps` times.
        """
