"""What a cache does not hold yet of a prompt: its pass, and where decoding begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.errors import CacheError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvloom.cache import LoomCache


@dataclass(frozen=True)
class Prompt:
    """Tokens to read, behind those that the cache holds.

    Attributes:
        new: int64 ``[batch, tokens]``, not in the cache.
        mask: bool ``[batch, held + tokens]``, False where a prompt is padded.
    """

    new: Tensor
    mask: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, held: int) -> Prompt:
        """From what ``generate`` is given.

        Args:
            input_ids: All tokens, or with a longer mask the new ones.
            attention_mask: Of all tokens; None for no padding.
            held: Tokens in the cache.

        Raises:
            CacheError: No token is new.
        """
        masked = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        new = input_ids[:, held:] if masked == input_ids.shape[1] else input_ids
        if not new.shape[1]:
            raise CacheError(
                f"the cache holds all {held} tokens of the prompt already: give at least one token that it has not "
                "read, or a fresh cache."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return cls(new, mask.to(device=input_ids.device, dtype=torch.bool))

    @property
    def tokens(self) -> int:
        """Tokens in the cache once the prompt is read."""
        return self.mask.shape[1]

    def next_position(self) -> Tensor:
        """int64 ``[batch, 1]``: of the first decoded token."""
        return self.mask.sum(dim=1, keepdim=True)

    def read(self, model: PreTrainedModel, cache: LoomCache, chunk: int | None, options: dict[str, int]) -> Tensor:
        """Pass the new tokens through the model; float32 scores ``[batch, vocabulary]`` of the next one.

        Args:
            model: The model.
            cache: It appends them.
            chunk: Tokens in a pass; None for all.
            options: Further inputs of the model.
        """
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        held = self.tokens - self.new.shape[1]
        mask = None if bool(self.mask.all()) else self.mask.long()
        step = chunk or self.new.shape[1]
        for start in range(0, self.new.shape[1], step):
            ids = self.new[:, start : start + step]
            stop = held + start + ids.shape[1]
            logits = model(
                input_ids=ids,
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=positions[:, held + start : stop],
                past_key_values=cache,
                use_cache=True,
                **options,
            ).logits
        scores: Tensor = logits[:, -1].to(copy=True, dtype=torch.float32)
        return scores
