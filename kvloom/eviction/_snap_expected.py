"""Attention that was observed and attention that is expected, added up (kvloom's own).

SnapKV's last queries say what the prompt's end, often a question, looks for; expected attention says what any query to
come is likely to look at. The mean attention that a token receives from the ``observed`` last queries (`_snapkv`, not
pooled) and its expected weight (`_expected_attention`, without the norm of its value) are both shares of one query's
attention, so they are added as they are. The observed queries' own tokens are always kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from kvloom.eviction._base import register
from kvloom.eviction._expected_attention import ExpectedAttention

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen


class SnapExpected(ExpectedAttention):
    """Tokens by the attention of the prompt's last queries, and by what queries like the newest ones are to pay.

    Attributes:
        observed: Last queries of the prompt whose attention is observed, at most ``window``.
    """

    name = "snap_expected"
    observed: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _sees_what_it_observes(self) -> Self:
        if self.observed > self.window:
            raise ValueError(f"observed is {self.observed}, window {self.window}: observe at most the window's queries")
        return self

    def newest(self, budget: int) -> int:
        """See `Policy.newest`."""
        return self.observed

    def scores(self, seen: Seen) -> torch.Tensor:
        """Mean observed attention and expected weight."""
        count = min(self.observed, seen.queries.shape[2])
        received = seen.received(count)
        received[..., received.shape[-1] - count :].zero_()
        return received / count + self.expected(seen)


register(SnapExpected)
