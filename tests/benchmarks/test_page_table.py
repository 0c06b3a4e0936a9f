"""The benchmark of block tables runs, and its ways compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import page_table
from kvloom.bench._grid import make_grid

CPU = torch.device("cpu")


@pytest.fixture
def grid():
    return make_grid(CPU, shapes="B3x128", pairs="4:2", heads="4/2", head_dim=64, window=20)


def test_every_way_is_the_same_attention(grid):
    shape, pair = grid.shapes[0], grid.pairs[0]
    contiguous, *others = (way() for way in page_table.ways(grid, shape, pair, CPU).values())
    assert len(others) == 3
    for other in others:
        torch.testing.assert_close(other, contiguous)


def test_it_measures_and_judges(grid, monkeypatch):
    for name in ("SECONDS", "MIN_SAMPLES"):
        monkeypatch.setattr(f"kvloom.bench._timing.{name}", 1)
    seconds = page_table.run(grid, grid.shapes[0], grid.pairs[0], CPU)
    assert list(seconds) == ["contiguous", "in order", "shuffled", "plugin"]
    assert min(seconds.values()) > 0
    assert page_table.verdict({"contiguous": 1.0, "shuffled": 1.04}).reached
    assert not page_table.verdict({"contiguous": 1.0, "shuffled": 1.06}).reached
