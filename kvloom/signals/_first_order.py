"""First order: the storage error of every cached number times the gradient it meets.

Source: PM-KVQ (arXiv 2505.18610): the absolute product of the error and of the gradient by the cached number. Here it
is summed over a prompt: `sum_i |g_i (x_hat_i - x_i)| / scored`, in nats per scored token, `g` the gradient of the
summed cross entropy of the true next tokens. It bounds the change of the loss to first order; errors that cancel count
in full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._stored import state_error


class FirstOrder(LayerSignal):
    """Sum of absolute products of errors and gradients."""

    name = "first_order"
    labels = "true"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, nats per scored token."""
        sums = [part.abs().sum(dim=(2, 3)) for part in products(evidence)]
        return torch.stack(sums, dim=2) / evidence.scored[:, None, None]


def products(evidence: Evidence) -> list[Tensor]:
    """Error times gradient of each packed number, float32 `[batch, kv_heads, tokens, head_dim]` a format."""
    gradient = evidence.attention.state_gradients()[0 if evidence.side == "key" else 1]
    slope = gradient[:, :, evidence.packed].float()
    return [slope * state_error(evidence.states, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats]
