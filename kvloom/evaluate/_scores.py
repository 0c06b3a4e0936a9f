"""Token scores: how far one next-token distribution is from the dense cache's."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_ROWS = {"cpu": 4}
"""Rows of float64 logits worked on at a time: few enough that they stay in a CPU's caches."""

_MANY_ROWS = 512
"""Elsewhere: enough to fill a GPU."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of consecutive tokens, all `[tokens]`, on the CPU.

    Attributes:
        kld: float32, Kullback-Leibler divergence KL(dense || contestant) in nats, over the whole
            vocabulary.
        nll: float32, negative log-likelihood of the true next token in nats.
        dense_nll: float32, the same under the dense cache.
        top1: float32, 1 where the most probable next token is the dense cache's, else 0.
    """

    kld: Tensor
    nll: Tensor
    dense_nll: Tensor
    top1: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens scored."""
        return len(self.kld)

    @staticmethod
    def join(parts: list[TokenScores]) -> TokenScores:
        """Scores of several stretches as one."""
        names = [field.name for field in fields(TokenScores)]
        return TokenScores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def score_tokens(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    """Compare two next-token distributions, in float64 from the log-softmax on.

    Args:
        reference: `[tokens, vocabulary]` logits of the dense cache.
        logits: `[tokens, vocabulary]` logits of the contestant.
        targets: `[tokens]` int64, the true next tokens.
    """
    rows = _ROWS.get(logits.device.type, _MANY_ROWS)
    pieces = zip(*(torch.split(x, rows) for x in (reference, logits, targets)), strict=True)
    return TokenScores.join([_score_rows(*piece) for piece in pieces])


def _score_rows(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    dense = reference.double().log_softmax(dim=-1)
    other = logits.double().log_softmax(dim=-1)
    index = targets[:, None]
    agree = reference.argmax(dim=-1) == logits.argmax(dim=-1)
    divergence = (dense.exp() * (dense - other)).sum(dim=-1)
    return TokenScores(
        kld=divergence.clamp_min(0).float().cpu(),
        nll=-other.gather(1, index)[:, 0].float().cpu(),
        dense_nll=-dense.gather(1, index)[:, 0].float().cpu(),
        top1=agree.float().cpu(),
    )
