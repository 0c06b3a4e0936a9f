"""What ``return_dict_in_generate`` asks for besides tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    from kvloom.cache import LoomCache


class Told:
    """Scores and logits of every step, where they are asked for.

    Args:
        config: Of ``generate``.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self._wants_dict = bool(config.return_dict_in_generate)
        self._scores: list[Tensor] | None = [] if self._wants_dict and config.output_scores else None
        self._logits: list[Tensor] | None = [] if self._wants_dict and config.output_logits else None

    def add_logits(self, logits: Tensor) -> None:
        """What the model said, ``[batch, vocabulary]``."""
        if self._logits is not None:
            self._logits.append(logits.clone())

    def add_scores(self, scores: Tensor) -> None:
        """Likewise, as processed."""
        if self._scores is not None:
            self._scores.append(scores.clone())

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """Those of every step so far; None if they are not asked for."""
        return None if self._scores is None else tuple(self._scores)

    def output(self, sequences: Tensor, cache: LoomCache) -> Tensor | GenerateDecoderOnlyOutput:
        """What ``generate`` returns."""
        if not self._wants_dict:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        logits = None if self._logits is None else tuple(self._logits)
        fields: dict[str, Any] = {"sequences": sequences, "scores": self.scores, "logits": logits}
        return GenerateDecoderOnlyOutput(**fields, past_key_values=cache)
