"""KVQ's rule on what is cached: norms of the measured keys and values in place of those of the weights.

Source: KVQ (arXiv 2502.15075): the squared error of a b-bit quantiser is of the order `||M||^2 4^-b`, `M` the cached
keys or values of a layer. The norm is the Frobenius or the spectral one of its packed tokens, a matrix
`[tokens, kv_heads * head_dim]`, squared, per token. Of a format only its bits count. (A model that normalises its keys
after the projection caches other norms than its weights have.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal


class CacheNorm(LayerSignal):
    """Squared norm of the packed states times `4^-bits`.

    Args:
        name: Name of the signal.
        squared: The squared norm of matrices.
    """

    def __init__(self, name: str, squared: Callable[[Tensor], Tensor]) -> None:
        self.name = name  # type: ignore[misc]  # one class, a signal for each norm
        self._squared = squared

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, 1, formats]`."""
        tokens = evidence.states[:, :, evidence.packed].transpose(1, 2).flatten(2)
        norms = self._squared(tokens) / tokens.shape[1]
        bits = torch.tensor([4.0**-fmt.bits for fmt in evidence.formats], device=norms.device)
        return (norms[:, None] * bits)[:, None]
