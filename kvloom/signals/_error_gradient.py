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
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom import codecs
from kvloom.pages import Format, page_tokens_of
from kvloom.signals._base import Evidence, Signal, register
from kvloom.signals._replay import key_changes, value_gradient

QUERY_BLOCK = 16
"""Neighbouring queries whose changes are added before they are squared."""


class ErrorGradient(Signal):
    """One column a candidate format: expected KL divergence in nats per scored token."""

    name = "error_gradient"

    def score(self, evidence: Evidence) -> Tensor:
        """See `Signal.score`; `[batch, formats]`, nats of KL divergence per scored token."""
        parts = _key_parts(evidence) if evidence.side == "key" else _value_parts(evidence)
        return parts / (2.0 * evidence.scored[:, None])


def storage_error(packed: Tensor, fmt: Format) -> Tensor:
    """Decoded minus original: float32 `[batch, kv_heads, tokens, head_dim]`, whole pages."""
    return codecs.as_stored(packed, fmt, page_tokens_of(fmt)) - packed.float()


def _value_parts(evidence: Evidence) -> Tensor:
    """Sum of squared changes of channels, `[batch, formats]`."""
    gradient = value_gradient(evidence.attention)[:, :, evidence.packed]
    values = evidence.attention.value[:, :, evidence.packed]
    squares = [
        torch.einsum("bhtd,bhtd->bhd", gradient, storage_error(values, fmt)).square().sum(dim=(1, 2))
        for fmt in evidence.formats
    ]
    return torch.stack(squares, dim=1)


def _key_parts(evidence: Evidence) -> Tensor:
    """Sum of squared changes of blocks of queries, `[batch, formats]`."""
    key = evidence.attention.key.float()
    stored = [_stored(key, evidence, fmt) for fmt in evidence.formats]
    changes = key_changes(evidence.attention, stored)
    whole = pad(changes, (0, -changes.shape[-1] % QUERY_BLOCK))
    blocks: Tensor = whole.unflatten(-1, (-1, QUERY_BLOCK)).sum(dim=-1)
    return blocks.square().sum(dim=-1).T


def _stored(key: Tensor, evidence: Evidence, fmt: Format) -> Tensor:
    stored, packed = key.clone(), evidence.packed
    if evidence.rope and fmt.pre_rope:
        before = evidence.rope.before(key[:, :, packed], packed.start)
        stored[:, :, packed] += evidence.rope.after(storage_error(before, fmt), packed.start)
    else:
        stored[:, :, packed] += storage_error(key[:, :, packed], fmt)
    return stored


ERROR_GRADIENT = register(ErrorGradient())
