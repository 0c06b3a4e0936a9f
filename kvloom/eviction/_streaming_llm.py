"""StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens, which soak up attention, and the newest ones.

Four sinks are what the paper needs; here they are the window's, always exact, and the first *real* tokens of a
left-padded sequence. Keys keep the rotary positions they had, as in QPruningKV and KVCache-Factory (the paper counts
positions anew within the cache). While decoding, the oldest page leaves when the budget would be passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kvloom.eviction._base import Policy, register

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen


class StreamingLLM(Policy):
    """The sinks and the newest tokens.

    Attributes:
        sinks: First tokens to keep, which the layer's window keeps exact.
        decode: Whether the budget is a ceiling while decoding.
    """

    name = "streaming_llm"
    sinks: int = Field(default=4, ge=0)
    decode: bool = True

    @property
    def min_sinks(self) -> int:
        """See `Policy.min_sinks`."""
        return self.sinks

    @property
    def evicts_while_decoding(self) -> bool:
        """See `Policy.evicts_while_decoding`."""
        return self.decode

    def scores(self, seen: Seen) -> torch.Tensor:
        """The later, the better."""
        return seen.slots.double()


register(StreamingLLM)
