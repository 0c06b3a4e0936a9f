"""KVTuner's e_k and e_v: the relative error of the stored keys, and of the stored values.

Source: KVTuner (arXiv 2502.04420): `mean |K - K_hat| / |K|`, likewise for values. `|.|` is read as the 1-norm of a
token's vector in a head: divided element by element, the mean would be that of the few elements next to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._stored import state_error


class StateError(LayerSignal):
    """Mean over tokens of the relative error of a head's vector."""

    name = "state_error"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, without unit."""
        exact = evidence.states[:, :, evidence.packed]
        errors = [state_error(evidence.states, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats]
        return torch.stack([relative(error, exact).mean(dim=2) for error in errors], dim=2)


def relative(error: Tensor, exact: Tensor) -> Tensor:
    """Ratio of 1-norms along the last dimension, float32; 0 where both are 0."""
    whole = exact.float().abs().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return error.float().abs().sum(dim=-1) / whole


STATE_ERROR = StateError()
