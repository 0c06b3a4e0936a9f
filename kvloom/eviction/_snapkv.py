"""SnapKV (Li et al., arXiv 2404.14469): what the last queries of the prompt attend to is what answers will need.

The attention that each token receives from the ``window`` last queries is summed (mean over the query heads of a KV
head), then pooled over neighbouring tokens, so that what surrounds an important token stays with it. The window itself
is always kept and lends its neighbours nothing. Tokens are chosen once, at the prompt's end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from kvloom.eviction._base import Policy, Pooling, register

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen


class SnapKV(Policy):
    """Tokens by the attention of the prompt's last queries.

    Attributes:
        window: Last queries of the prompt; their tokens are always kept.
        kernel: Tokens that are pooled, an odd number.
        pooling: ``max`` or ``avg``.
    """

    name = "snapkv"
    window: int = Field(default=32, ge=1)
    kernel: int = Field(default=7, ge=1)
    pooling: Pooling = "max"

    @field_validator("kernel")
    @classmethod
    def _kernel_is_odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"{kernel} is even: take an odd number of tokens, so that a score stays at its token")
        return kernel

    @property
    def num_queries(self) -> int:
        """See `Policy.num_queries`."""
        return self.window

    def newest(self, budget: int) -> int:
        """See `Policy.newest`."""
        return self.window

    def scores(self, seen: Seen) -> torch.Tensor:
        """Attention received from the window, pooled over the tokens before it."""
        received = seen.received()
        received[..., received.shape[-1] - seen.queries.shape[2] :].zero_()
        return seen.pooled(received, self.kernel, self.pooling)


register(SnapKV)
