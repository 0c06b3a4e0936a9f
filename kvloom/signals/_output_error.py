"""KVTuner's e_o: the relative error of the attention output when one side is read as stored.

Source: KVTuner (arXiv 2502.04420): `mean |o - o_hat| / |o|`, the one it prunes and groups layers by. `|.|` is read as
the 1-norm of a query head's output, as in `state_error`; the mean is over the queries that see packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._replay import output_changes
from kvloom.signals._state_error import relative
from kvloom.signals._stored import as_read


class OutputError(LayerSignal):
    """Mean over queries of the relative error of their output."""

    name = "output_error"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, without unit."""
        stored = [as_read(evidence.states, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats]
        total, queries = torch.zeros((len(stored), *evidence.states.shape[:2]), device=evidence.states.device), 0
        for exact, changes in output_changes(evidence.attention, evidence.side, stored):
            total += relative(changes, exact).sum(dim=(3, 4))
            queries += exact.shape[2] * exact.shape[3]
        return total.permute(1, 2, 0) / max(queries, 1)
