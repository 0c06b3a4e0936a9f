"""H2O (Zhang et al., arXiv 2306.14048): heavy hitters, which have received the most attention, and recent tokens.

The attention a token receives is summed over every query so far, under the causal mask, and averaged over the query
heads of its KV head. With ``decode`` the sums go on while tokens come one by one, and the page that has received least
leaves when the budget would be passed; otherwise tokens are chosen once, at the prompt's end, as QPruningKV does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kvloom.eviction._base import Policy, register

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen


class H2O(Policy):
    """Tokens by the attention they have received.

    Attributes:
        recent: Newest tokens that are always kept; None for half the budget, as in the paper.
        decode: Whether the budget is a ceiling while decoding.
    """

    name = "h2o"
    sums_attention = True
    recent: int | None = Field(default=None, ge=1)
    decode: bool = True

    @property
    def evicts_while_decoding(self) -> bool:
        """See `Policy.evicts_while_decoding`."""
        return self.decode

    def newest(self, budget: int) -> int:
        """See `Policy.newest`."""
        return budget // 2 if self.recent is None else self.recent

    def scores(self, seen: Seen) -> torch.Tensor:
        """Attention received so far."""
        assert seen.mass is not None
        return seen.mass


register(H2O)
