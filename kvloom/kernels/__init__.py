"""The hot operations (encode, attend, decode, append) behind one contract."""

from __future__ import annotations

from kvloom.codecs import OUT_OF_RANGE
from kvloom.kernels._base import PRODUCT_ROWS, PRODUCT_WEIGHTS, SUM_NBYTES, Backend, Reach
from kvloom.kernels._between_pages import between_pages, is_between_pages
from kvloom.kernels._invariant import INVARIANT, invariant_attention
from kvloom.kernels._ops import append, attend_static
from kvloom.kernels._registry import backend, backends
from kvloom.kernels._torch import dense_attention
from kvloom.kernels._turns import turned, turned_back

__all__ = [
    "INVARIANT",
    "OUT_OF_RANGE",
    "PRODUCT_ROWS",
    "PRODUCT_WEIGHTS",
    "SUM_NBYTES",
    "Backend",
    "Reach",
    "append",
    "attend_static",
    "backend",
    "backends",
    "between_pages",
    "dense_attention",
    "invariant_attention",
    "is_between_pages",
    "turned",
    "turned_back",
]
