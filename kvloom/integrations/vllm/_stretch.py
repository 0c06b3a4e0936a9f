"""Sequences of several tokens whose exact states attention reads as plain tensors, in one call."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

from kvloom.integrations.vllm._blocks import on_device
from kvloom.integrations.vllm._sequence import Sequence


class Varlen(Protocol):
    """Causal attention of sequences that lie one behind the other, as FlashAttention's function of this name has it."""

    def __call__(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> object:
        """Fill ``out``; the queries of a sequence are its last tokens.

        Args:
            q: ``[queries of all, num_heads, head_dim]``.
            k: ``[states of all, kv_heads, head_dim]``.
            v: The same shape.
            out: The shape of ``q``.
            cu_seqlens_q: int32 ``[sequences + 1]``, where the queries of each start, and where the last ones end.
            cu_seqlens_k: Likewise of the states.
            max_seqlen_q: Queries of the sequence that has most.
            max_seqlen_k: Likewise of the states.
        """


@dataclass(frozen=True)
class Stretch:
    """Sequences whose tokens follow each other in a pass: one, or several that it begins.

    Attributes:
        sequences: In order.
    """

    sequences: SequenceOf[Sequence]

    @property
    def own(self) -> slice:
        """The places of their tokens among those of the pass."""
        return slice(self.sequences[0].own.start, self.sequences[-1].own.stop)

    @property
    def is_begun(self) -> bool:
        """Whether the pass begins them: they have nothing before it."""
        return self.sequences[0].computed == 0

    def attend(
        self, varlen: Varlen, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Let the tokens of the pass read all tokens of their sequences.

        Args:
            varlen: What computes attention.
            query: ``[tokens, num_heads, head_dim]``, of the pass.
            key: ``[states, kv_heads, head_dim]``, of all tokens of the sequences.
            value: The same shape.
            out: The shape of ``query``, filled in.
        """
        varlen(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=self._starts_of_queries,
            cu_seqlens_k=self._starts_of_states,
            max_seqlen_q=max(self._queries),
            max_seqlen_k=max(each.length for each in self.sequences),
        )

    @property
    def _queries(self) -> list[int]:
        return [each.length - each.computed for each in self.sequences]

    @cached_property
    def _starts_of_queries(self) -> torch.Tensor:
        return self._starts(self._queries)

    @cached_property
    def _starts_of_states(self) -> torch.Tensor:
        return self._starts_of_queries if self.is_begun else self._starts([each.length for each in self.sequences])

    def _starts(self, lengths: list[int]) -> torch.Tensor:
        return on_device([0, *accumulate(lengths)], torch.int32, self.sequences[0].device)


def stretches(sequences: SequenceOf[Sequence]) -> list[Stretch]:
    """Sequences of a pass, rising, by the calls of attention that read them."""
    found: list[list[Sequence]] = []
    for each in sequences:
        last = found[-1][-1] if found else None
        if last is not None and each.computed == last.computed == 0 and each.own.start == last.own.stop:
            found[-1].append(each)
        else:
            found.append([each])
    return [Stretch(those) for those in found]
