"""Attention over pages that a table finds in shared blocks, against float64 on the same codes."""

from __future__ import annotations

import pytest
import torch

from kvloom.kernels import INVARIANT, backend
from kvloom.kernels._torch import TORCH
from kvloom.pages import Format, page_layout
from tests.kernels.tabled import attention, mixed_layouts, tabled_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(30))
def test_the_reference_reads_every_sequence_through_the_table(seed):
    case = tabled_case(seed, mixed_layouts(seed, (64, 80, 128)[seed % 3]))
    softcap = 20.0 if seed % 5 == 0 else None
    for each in (TORCH, backend(CPU), INVARIANT):
        out = each.attend_static(case.query, case.kv, scaling=0.1, softcap=softcap)
        torch.testing.assert_close(out.double(), case.expected(0.1, softcap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 3, 64])
def test_the_reference_reads_several_tokens_of_a_sequence(queries):
    """Many queries of a head take the way over unpacked pages."""
    case = tabled_case(8, mixed_layouts(8, 64))
    for row in range(len(case.states)):
        kv, query, states = case.one(row, queries)
        for each in (TORCH, backend(CPU), INVARIANT):
            out = each.attend(query, kv, scaling=0.1)
            torch.testing.assert_close(out[0].double(), attention(query[0], states, 0.1), atol=1e-5, rtol=1e-5)


def test_a_sequence_is_what_its_records_are_in_order():
    layout = page_layout(Format(4, "per_channel", 64), Format(2, "per_token", 64), 64, 4)
    case = tabled_case(1, (layout,) * 2, most=3)
    for row, (tokens, pages) in enumerate(case.kv.levels().tolist()):
        kv = case.kv.paged(slice(row, row + 1), tokens, pages)
        (through,), (in_order,) = kv.pages, kv.in_order().pages
        assert through.data.data_ptr() == case.kv.pages[0].data.data_ptr()
        assert in_order.data.shape[:3] == (1, 2, pages)
        for page, block in enumerate(case.kv.table[row, :pages].tolist()):
            assert in_order.data[0, :, page].equal(through.data[0, :, block])
        ours = TORCH.decode(through.data, layout, kv.dtype, kv.table)
        assert all(map(torch.equal, ours, TORCH.decode(in_order.data, layout, kv.dtype)))
