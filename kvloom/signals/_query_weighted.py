"""Query-weighted error: what those who read the cache notice of a storage error, without gradients.

Source: the key errors of OSCAR (arXiv 2605.17757) and Block-GTQ (arXiv 2606.24033), weighted with the second moment of
the queries. With `e_t` the error of token `t`:

- keys: the mean squared change of a score before the softmax, `s^2 mean_t e_t^T M e_t`, `M` the mean of `q q^T` over
  the prompt's queries of the KV head's group, `s` the scale of the scores;
- values: what errors that are independent from token to token do to the attention output, in the norm of the output
  projection and relative to that output: `sum_t (sum_i p_it^2) e_t^T W e_t / sum_i o_i^T W o_i`, `p_it` the score of
  query `i`, `o_i` its output, `W` the second moment of the projection's columns of that group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._projections import output_moment
from kvloom.signals._replay import seen_runs
from kvloom.signals._stored import state_error
from kvloom.signals._tap import grouped_matmul


class QueryWeighted(LayerSignal):
    """Squared errors, weighted with what reads them; values relative to the output."""

    name = "query_weighted"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, without unit."""
        noticed = _keys(evidence) if evidence.side == "key" else _values(evidence)
        errors = [state_error(evidence.states, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats]
        weight, moment = noticed
        return torch.stack([(weight * _forms(error, moment)).sum(dim=2) for error in errors], dim=2)


def _keys(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Weight of each packed token `[1, 1, 1]`, and the moment `[batch, kv_heads, head_dim, head_dim]`."""
    queries = evidence.attention.query.float().flatten(2, 3)
    moment = queries.mT @ queries * (evidence.attention.scoring.scale**2 / queries.shape[2])
    tokens = evidence.packed.stop - evidence.packed.start
    return torch.full((1, 1, 1), 1.0 / tokens, device=moment.device), moment


def _values(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Weight of each packed token `[batch, kv_heads, tokens]`, and the moment `[kv_heads, head_dim, head_dim]`."""
    value = evidence.states.float()
    moment = output_moment(evidence.model, evidence.layer, evidence.shape).float().to(value.device)
    mass, energy = torch.zeros_like(value[..., 0]), torch.zeros_like(value[:, :, 0, 0])
    for run, _, weights in seen_runs(evidence.attention):
        mass[:, :, run.first : run.last] += weights[..., run.first : run.last].square().sum(dim=(2, 3))
        outputs = grouped_matmul(weights, value[:, :, : run.stop]).flatten(2, 3)
        energy += _forms(outputs, moment).sum(dim=2)
    whole = energy.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return mass[:, :, evidence.packed] / whole[:, None, None], moment


def _forms(vectors: Tensor, moment: Tensor) -> Tensor:
    """`v^T M v` of vectors `[batch, kv_heads, n, head_dim]`, `[batch, kv_heads, n]`."""
    return ((vectors @ moment) * vectors).sum(dim=-1)
