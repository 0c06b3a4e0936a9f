"""Expected attention (Devoto, Jeblick and Jegou, arXiv 2510.00636): what queries to come are likely to attend to.

Queries are taken as normally distributed with mean ``m`` and covariance ``C``, so that the expected unnormalised weight
of a key is ``E[exp(s q.k)] = exp(s m.k + s^2 k.C k / 2)`` (``s`` the factor of the scores). These weights, made to sum
to one for each query head, are averaged over the query heads of a KV head; a token is worth its weight times the norm
of its value. The paper takes queries before their rotary embedding and turns ``m`` and ``C`` to the positions to come;
here ``m`` and ``C`` are those of the ``window`` newest queries as they are, whose positions are the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kvloom.eviction._base import Policy, register

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen


class ExpectedAttention(Policy):
    """Tokens by the attention that queries like the newest ones are expected to pay.

    Attributes:
        window: Newest queries whose mean and covariance are taken.
    """

    name = "expected_attention"
    window: int = Field(default=512, ge=1)

    @property
    def num_queries(self) -> int:
        """See `Policy.num_queries`."""
        return self.window

    def scores(self, seen: Seen) -> torch.Tensor:
        """Expected weight times the norm of the value."""
        worth: torch.Tensor = self.expected(seen) * seen.values.float().norm(dim=-1)
        return worth

    def expected(self, seen: Seen) -> torch.Tensor:
        """Expected weights ``[batch, kv_heads, tokens]``, fp32; those of a head sum to one."""
        queries, is_real = seen.queries.float(), seen.is_real[:, :1, -seen.queries.shape[2] :, None]
        count = is_real.sum(2, keepdim=True).clamp_min(1)
        mean = (queries * is_real).sum(2, keepdim=True) / count
        apart = seen.of_heads((queries - mean) * is_real)
        covariance = apart.transpose(-1, -2) @ apart / count[:, :, None]  # [batch, kv_heads, group, head_dim, head_dim]
        keys, scaling = seen.keys.float()[:, :, None], seen.reading.scaling
        expected = scaling * (keys * seen.of_heads(mean)).sum(-1)
        expected = expected + 0.5 * scaling**2 * (keys @ covariance * keys).sum(-1)
        weights: torch.Tensor = expected.masked_fill(~seen.is_real[:, :, None], -float("inf")).softmax(-1).mean(2)
        return weights


register(ExpectedAttention)
