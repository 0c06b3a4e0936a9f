"""The arithmetic, on made-up timings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvloom.bench import Pair, Shape
from kvloom.bench._bytes import attend_bytes, attend_flops, dense_bytes, encode_bytes
from kvloom.bench._caches import random_cache
from kvloom.bench._ceilings import Ceilings
from kvloom.bench._dense import best_dense
from kvloom.bench._error import judged
from kvloom.bench._figures import Dense, against_dense, rates, times_bound
from kvloom.bench._timing import Timing, sample_count, summary

CEILINGS = Ceilings(read=4e12, copy=3e12, flops=1e15)
TIMING = Timing(seconds=100e-6, p10=99e-6, p90=105e-6, method="graph")


def test_rates():
    fields = rates(TIMING, 300_000_000, CEILINGS)
    assert fields["bytes_per_s"] == pytest.approx(3e12)
    assert fields["share_of_read"] == pytest.approx(0.75)
    assert fields["share_of_copy"] == pytest.approx(1.0)
    assert times_bound(TIMING, 300_000_000, CEILINGS) == pytest.approx(1 / 0.75)
    assert {key: fields[key] for key in ("seconds", "p10", "p90", "method", "nbytes")} == {
        "seconds": 100e-6,
        "p10": 99e-6,
        "p90": 105e-6,
        "method": "graph",
        "nbytes": 300_000_000,
    }


def test_against_dense():
    dense = Dense("sdpa-cudnn", 350e-6, 1_200_000_000)
    fields = against_dense(TIMING, 300_000_000, dense)
    assert fields["dense"] == "sdpa-cudnn"
    assert fields["times_dense"] == pytest.approx(3.5)
    assert fields["bytes_allow"] == pytest.approx(4.0)
    assert against_dense(TIMING, 1, None) == {"dense": None, "times_dense": None, "bytes_allow": None}


def test_the_best_dense_is_the_fastest_that_computes_attention():
    common = {"skipped": None, "nbytes": 7}
    records = [
        {"name": "slow", "seconds": 3.0, **common, **judged(1e-3)},
        {"name": "good", "seconds": 2.0, **common, **judged(1e-3)},
        {"name": "wrong", "seconds": 1.0, **common, **judged(0.5)},
        {"name": "unwritten", "seconds": 0.5, **common, **judged(float("nan"))},
        {"name": "absent", "skipped": "not installed"},
    ]
    assert best_dense(records) == Dense("good", 2.0, 7)
    assert best_dense(records[2:]) is None


def test_judged():
    assert judged(1e-3) == {"error": 1e-3, "fault": None}
    assert judged(float("inf"))["error"] is None
    assert "not written" in judged(float("nan"))["fault"]
    assert "something else" in judged(0.2)["fault"]


def test_bytes_of_attention_are_those_of_the_live_tensors(grid):
    for pair in (Pair(4, 2), Pair(3, 16)):
        kv = random_cache(grid, Shape(2, 256), pair, torch.device("cpu"))
        tensors = [kv.pages[0].data, kv.tail.key, kv.tail.value]
        query_and_output = 2 * 2 * grid.query_heads * grid.head_dim * 4
        live = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert attend_bytes(grid, Shape(2, 256), pair) == live + query_and_output


def test_bytes_by_hand():
    """The figures of page-format.md: a K4V4 record of 64 tokens and 128 channels is 8960 bytes, 4.375 true bits."""
    from kvloom.bench import make_grid

    grid, shape, pair = make_grid(torch.device("cuda")), Shape(8, 32768), Pair(4, 4)
    pages, window, query = 8 * 8 * 512 * 8960, 8 * 8 * 2 * 32 * 128 * 2, 2 * 8 * 32 * 128 * 2
    cache = 8 * 8 * 32768 * 2 * 128 * 2
    assert attend_bytes(grid, shape, pair) == pages + window + query
    assert attend_bytes(replace(grid, window=0), shape, pair) == pages + query
    assert dense_bytes(grid, shape) == cache + query
    assert encode_bytes(grid, shape, pair) == cache + pages
    assert attend_flops(grid, shape, 32800) == 4 * 8 * 32 * 32800 * 128


def test_summary_is_a_median_with_its_spread():
    timing = summary([5.0, 1.0, 3.0, 2.0, 100.0], "wall")
    assert timing.seconds == 3.0
    assert timing.p10 == pytest.approx(1.4)
    assert timing.p90 > timing.seconds


@pytest.mark.parametrize(("seconds", "count"), [(10.0, 10), (0.01, 15), (1e-7, 200), (0.0, 200)])
def test_sample_count(seconds: float, count: int):
    assert sample_count(seconds) == count
