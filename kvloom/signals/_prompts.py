"""Calibration prompts: what is read, what is scored, and which next tokens the gradients start from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom._vocabulary import check_vocabulary
from kvloom.errors import DataError
from kvloom.signals._base import Labels
from kvloom.signals._calibration import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompts:
    """Checked calibration data; all tensors on the CPU.

    Attributes:
        tokens: int64 `[prompts, tokens]`.
        mask: bool `[prompts, tokens]`, or None without padding.
        scored: bool `[prompts, tokens]`: the next token is known and neither is padding.
        uniform: float32 `[prompts, tokens]` in [0, 1): the draws behind the sampled next tokens.
    """

    tokens: Tensor
    mask: Tensor | None
    scored: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, seed: int) -> Prompts:
        """Checks prompts for a model; see `compute_profile` for the arguments and errors."""
        if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.is_floating_point():
            raise DataError(
                f"tokens must be integers [prompts, tokens] of at least one prompt; got {list(tokens.shape)}."
            )
        if mask is not None and mask.shape != tokens.shape:
            raise DataError(f"attention_mask {list(mask.shape)} must have the shape of tokens {list(tokens.shape)}.")
        tokens = tokens.cpu().long().contiguous()
        check_vocabulary(model, tokens)
        mask = None if mask is None else mask.cpu().bool()
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        scored = torch.zeros_like(real)
        scored[:, :-1] = real[:, :-1] & real[:, 1:]
        if not bool(scored.any(dim=1).all()):
            prompt = int((~scored.any(dim=1)).nonzero()[0])
            raise DataError(
                f"prompt {prompt} has fewer than two tokens in a row, so no next token can be scored; "
                "give longer prompts."
            )
        uniform = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
        return cls(tokens, mask, scored, uniform)

    @property
    def sha256(self) -> str:
        """Hash of the token ids, little-endian int64, prompt after prompt."""
        return hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the token ids, and of what is scored and drawn: what a measurement of these prompts depends on."""
        drawn = hashlib.sha256(self.scored.numpy().tobytes() + self.uniform.numpy().tobytes())
        return {"prompts": self.sha256, "drawn": drawn.hexdigest()}

    def calibration(self, texts: Sequence[str], seed: int) -> Calibration:
        """The record of these prompts; see `Calibration`."""
        count, tokens = self.tokens.shape
        return Calibration(sha256=self.sha256, texts=list(texts), prompts=count, tokens=tokens, seed=seed)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def batch(self, start: int, size: int) -> Prompts:
        """Prompts `start..start+size-1`."""
        rows = slice(start, start + size)
        mask = None if self.mask is None else self.mask[rows]
        return Prompts(self.tokens[rows], mask, self.scored[rows], self.uniform[rows])

    def next_tokens(self, labels: Labels, probabilities: Tensor, start: int = 0) -> Tensor:
        """Labels `[batch, rows]`, meaningless where nothing is scored; drawn by inverting the distribution.

        Args:
            labels: Which next tokens.
            probabilities: `[batch, rows, vocabulary]` after the tokens from `start` on.
            start: Position of the first row.
        """
        rows = slice(start, start + probabilities.shape[1])
        if labels == "true":
            return self.tokens.roll(-1, dims=1)[:, rows].to(probabilities.device)
        total = probabilities.cumsum(dim=-1)
        draw = self.uniform[:, rows].to(total.device)[..., None] * total[..., -1:]
        drawn = torch.searchsorted(total, draw, right=True)[..., 0]
        return drawn.clamp_(max=total.shape[-1] - 1)
