"""Errors against float64 on the same codes, computed without the backend that is judged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvloom import codecs
from kvloom.codecs import Encoded
from kvloom.pages import PagedKV, SideLayout, unpack_raw, unpack_side

# No attention in 16 bits is further from float64 than this, unless it computes something else.
MAX_ERROR = 0.03


def judged(error: float) -> dict[str, Any]:
    """Fields of a record: ``error``, None where it is not finite, and ``fault``, a sentence where it is too large."""
    if not math.isfinite(error):
        fault = "the output holds NaN or infinity: an element was not written, or overflows"
        return {"error": None, "fault": fault}
    return {"error": error, "fault": f"computes something else: error {error:.1e}" if error > MAX_ERROR else None}


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """``|out - expected| / |expected|``, Frobenius norms in float64; NaN if anything is."""
    return float((out.double() - expected).norm() / expected.norm())


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of one query a head in float64, sequence by sequence.

    Args:
        query: ``[batch, query_heads, 1, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: The same shape.
        scaling: Factor of the scores.

    Returns:
        float64 ``[batch, query_heads, head_dim]``.
    """
    return torch.stack([_one(*sequence, scaling) for sequence in zip(query, key, value, strict=True)])


def exact_paged_attention(query: torch.Tensor, kv: PagedKV, scaling: float) -> torch.Tensor:
    """`exact_attention` over the values that the codes of ``kv`` stand for, and its exact tokens."""
    (pages,) = kv.pages
    rows = []
    for i in range(len(query)):
        key = torch.cat([_unpacked(pages.data[i], pages.layout.key, kv.dtype), kv.tail.key[i].double()], dim=1)
        value = torch.cat([_unpacked(pages.data[i], pages.layout.value, kv.dtype), kv.tail.value[i].double()], dim=1)
        rows.append(_one(query[i], key, value, scaling))
    return torch.stack(rows)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch makes uninitialised within is full of NaN, so that an element nobody writes shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not deterministic, which is not the point
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """One sequence: ``query [query_heads, 1, dim]``, ``key`` and ``value [kv_heads, tokens, dim]``."""
    rows = query.double().view(len(key), -1, query.shape[-1])
    weights = (rows @ key.double().transpose(-1, -2) * scaling).softmax(dim=-1)
    return (weights @ value.double()).flatten(0, 1)


def _unpacked(data: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """float64 ``[kv_heads, tokens, head_dim]`` of ``data [kv_heads, pages, record bytes]``."""
    if side.fmt.is_passthrough:
        return unpack_raw(data, side, dtype).double().flatten(1, 2)
    codes, params = unpack_side(data, side)
    decoded = codecs.get(side.fmt.codec).decode(Encoded(codes, params), side.fmt)
    return decoded.double().flatten(1, 2)
