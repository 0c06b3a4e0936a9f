"""The page format: the only description of where a code, a scale, a position lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom._lazy import on_first_use
from kvloom.pages._codebook import CODEBOOK_BITS, Codebook
from kvloom.pages._codec_facts import CodecFacts, Form, codec_facts, declare_codec
from kvloom.pages._format import (
    BITS,
    GROUP_SIZES,
    HEAD_DIM_STEP,
    PAGE_TOKENS,
    PASSTHROUGH_BITS,
    Format,
    Grouping,
    Role,
    Rotation,
    check_format,
    page_tokens_of,
)
from kvloom.pages._fragment import Plane, source_index
from kvloom.pages._layout import PageLayout, SideLayout, num_outliers, page_layout, page_nbytes, side_nbytes

if TYPE_CHECKING:
    from kvloom.pages._handle import (
        ExactKV,
        HeadPages,
        KeptRecords,
        PagedKV,
        StaticKV,
        layouts_of,
        records_of,
        state_numbers,
    )
    from kvloom.pages._outliers import pack_outliers, unpack_outliers
    from kvloom.pages._pack import (
        RowRuns,
        codebook_points,
        pack_side,
        row_runs,
        side_matrix,
        unpack_params,
        unpack_raw,
        unpack_side,
    )
    from kvloom.pages._places import places, stored, stored_run
    from kvloom.pages._pooled import PooledKV

# The arithmetic is for plans, which need no torch; what touches tensors loads on first use.
_TENSOR_HOMES = {
    "ExactKV": "kvloom.pages._handle",
    "HeadPages": "kvloom.pages._handle",
    "KeptRecords": "kvloom.pages._handle",
    "PagedKV": "kvloom.pages._handle",
    "PooledKV": "kvloom.pages._pooled",
    "StaticKV": "kvloom.pages._handle",
    "codebook_points": "kvloom.pages._pack",
    "layouts_of": "kvloom.pages._handle",
    "pack_outliers": "kvloom.pages._outliers",
    "pack_side": "kvloom.pages._pack",
    "places": "kvloom.pages._places",
    "records_of": "kvloom.pages._handle",
    "RowRuns": "kvloom.pages._pack",
    "row_runs": "kvloom.pages._pack",
    "side_matrix": "kvloom.pages._pack",
    "state_numbers": "kvloom.pages._handle",
    "stored": "kvloom.pages._places",
    "stored_run": "kvloom.pages._places",
    "unpack_outliers": "kvloom.pages._outliers",
    "unpack_params": "kvloom.pages._pack",
    "unpack_raw": "kvloom.pages._pack",
    "unpack_side": "kvloom.pages._pack",
}

__all__ = [
    "BITS",
    "CODEBOOK_BITS",
    "GROUP_SIZES",
    "HEAD_DIM_STEP",
    "PAGE_TOKENS",
    "PASSTHROUGH_BITS",
    "Codebook",
    "CodecFacts",
    "ExactKV",
    "Form",
    "Format",
    "Grouping",
    "HeadPages",
    "KeptRecords",
    "PageLayout",
    "PagedKV",
    "Plane",
    "PooledKV",
    "Role",
    "Rotation",
    "RowRuns",
    "SideLayout",
    "StaticKV",
    "check_format",
    "codebook_points",
    "codec_facts",
    "declare_codec",
    "layouts_of",
    "num_outliers",
    "pack_outliers",
    "pack_side",
    "page_layout",
    "page_nbytes",
    "page_tokens_of",
    "places",
    "records_of",
    "row_runs",
    "side_matrix",
    "side_nbytes",
    "source_index",
    "state_numbers",
    "stored",
    "stored_run",
    "unpack_outliers",
    "unpack_params",
    "unpack_raw",
    "unpack_side",
]

__getattr__ = on_first_use(__name__, _TENSOR_HOMES)
