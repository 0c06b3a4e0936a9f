"""Predicted loss of storing keys or values in a format: the storage error times the gradient it meets.

To second order the KL divergence that a change of the cache causes at one position is half the variance,
under the model's own distribution of the next token, of the change of log p(next token) (the Fisher
information: Kullback and Leibler 1951). With next tokens *drawn from the model*, changes at different
positions are uncorrelated, so one backward pass from the sum over positions serves:

    KL per scored token = 1 / (2 scored) * E[(change of the sum of log p)^2]

One draw of that square is a poor estimate. The change is a sum of many parts, and where parts are
independent the sum of their squares has the same expectation and far less noise. Parts that are not
independent must stay together:

- values: the errors of one channel agree from token to token (a coarse grid rounds a channel that
  keeps its level the same way every time), those of different channels do not. Parts are channels.
- keys: neighbouring queries look at the same stored keys. Parts are blocks of neighbouring queries, over
  all heads. (The change itself is exact through the softmax, see `_replay`.)

The parts were chosen by comparison with measured KL divergence, one layer's keys or values at a time,
on SmolLM2-135M. Smaller parts predict less than is measured; larger ones scatter more.

A head's share of its layer is what its own parts say, scaled so that the shares of keys add up to the layer's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._replay import key_changes, value_gradient
from kvloom.signals._stored import as_read, state_error

QUERY_BLOCK = 16
"""Neighbouring queries whose changes are added before they are squared."""


class ErrorGradient(LayerSignal):
    """Expected KL divergence in nats per scored token."""

    name = "error_gradient"
    labels = "sampled"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, nats of KL divergence per scored token."""
        parts = _key_parts(evidence) if evidence.side == "key" else _value_parts(evidence)
        return parts / (2.0 * evidence.scored[:, None, None])


def _value_parts(evidence: Evidence) -> Tensor:
    """Sum of squared changes of channels, `[batch, kv_heads, formats]`."""
    gradient = value_gradient(evidence.attention)[:, :, evidence.packed]
    squares = []
    for fmt in evidence.formats:
        error = state_error(evidence.states, evidence.packed, fmt, None)
        squares.append(torch.einsum("bhtd,bhtd->bhd", gradient, error).square().sum(dim=2))
    return torch.stack(squares, dim=2)


def _key_parts(evidence: Evidence) -> Tensor:
    """Sum of squared changes of blocks of queries over all heads, shared out by heads, `[batch, kv_heads, formats]`."""
    stored = [as_read(evidence.states, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats]
    changes = key_changes(evidence.attention, stored)
    whole = pad(changes, (0, -changes.shape[-1] % QUERY_BLOCK))
    blocks = whole.unflatten(-1, (-1, QUERY_BLOCK)).sum(dim=-1)  # [formats, batch, kv_heads, blocks]
    own = blocks.square().sum(dim=-1)
    layer = blocks.sum(dim=2).square().sum(dim=-1)
    tiny = torch.finfo(own.dtype).tiny
    shares: Tensor = own * (layer / own.sum(dim=2).clamp_min(tiny))[:, :, None]
    return shares.permute(1, 2, 0)
