"""KVTuner's e_a: how far attention scores move when keys are read as stored.

Source: KVTuner (arXiv 2502.04420): `mean |a - a_hat|` of the scores after the softmax. Values have no part in scores:
for them this is `state_error`'s e_v. The mean is over query heads and over the queries that see packed tokens, the sum
over the tokens that a query sees (the mean over them would differ from query to query by their number).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._replay import in_groups, seen_runs, stored_weights
from kvloom.signals._state_error import STATE_ERROR
from kvloom.signals._stored import as_read


class ScoreError(LayerSignal):
    """Mean over queries of the 1-norm of the change of their scores."""

    name = "score_error"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, without unit."""
        if evidence.side == "value":
            return STATE_ERROR.score(evidence)
        attention, key = evidence.attention, evidence.states.float()
        groups = in_groups([as_read(key, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats])
        total, queries = key.new_zeros((len(evidence.formats), *key.shape[:2])), 0
        for run, query, weights in seen_runs(attention):
            moved = (stored_weights(attention, run, query, key, group) - weights for group in groups)
            total += torch.cat([change.abs().sum(dim=(3, 4, 5)) for change in moved])
            queries += query.shape[2] * query.shape[3]
        return total.permute(1, 2, 0) / max(queries, 1)
