"""Attention whose result for a query does not depend on the other queries of its pass, nor on how its keys arrived."""

from __future__ import annotations

from typing import Unpack

import torch

from kvloom.kernels._base import AttendOptions
from kvloom.kernels._kept import padded
from kvloom.kernels._torch import TorchBackend, column_mask, dense_attention
from kvloom.pages import PagedKV


class InvariantBackend(TorchBackend):
    """The reference with all pages unpacked and sums in fp64.

    What the order of these sums changes, about 1e-16, is lost when results are rounded to the compute dtype, unless one
    lies that near to where rounding turns: about one of 1e8 in fp32.
    """

    name = "invariant"

    def attend(self, query: torch.Tensor, kv: PagedKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        """See `Backend.attend`."""
        if kv.places is not None:
            kv, options["mask"] = padded(kv, options.get("mask"), query.shape[1], query.shape[2])
        if kv.num_pages:
            options["mask"] = column_mask(kv, options.get("mask"), query.shape[2])
        return invariant_attention(query, *self.all_states(kv), **options)


def invariant_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool = True,
    **options: Unpack[AttendOptions],
) -> torch.Tensor:
    """`dense_attention` with its sums in fp64."""
    mask = options.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        options["mask"] = mask.double()
    out = dense_attention(query.double(), key.double(), value.double(), is_causal=is_causal, **options)
    return out.to(query.dtype)


INVARIANT = InvariantBackend()
