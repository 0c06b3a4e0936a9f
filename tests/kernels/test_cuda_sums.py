"""Sums over ranks on a GPU, several of which share it, each on a stream of its own; two GPUs are not needed."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvloom.kernels import SUM_NBYTES, _cuda_sums, _nvrtc
from tests.kernels.ranks import DEVICE, Ranks, assert_sums

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SOON = 1 << 23  # polls: some seconds
ALONE = """
import torch
from kvloom.kernels import _cuda_sums
from tests.kernels.ranks import Ranks

_cuda_sums.POLLS = 1 << 20
ranks = Ranks(2)
_cuda_sums.sum_ranks(torch.ones(64, device="cuda"), ranks.meetings[0])
torch.cuda.synchronize()
"""


@pytest.fixture
def bounded(monkeypatch):
    """A rank that another one keeps waiting gives up soon."""
    monkeypatch.setattr(_cuda_sums, "POLLS", SOON)


def drawn(rng, ranks, dtype=None, most=SUM_NBYTES):
    """An addend of every rank; small sizes as often as large ones."""
    dtype = dtype or rng.choice(DTYPES)
    of_piece = 8 // dtype.itemsize
    pieces = min(most // 8, rng.choice([1, 2, 255, 256, 257, 8192, 32768, rng.randint(1, 600), rng.randint(1, 32768)]))
    generator = torch.Generator(DEVICE).manual_seed(rng.randrange(1 << 30))
    shape = (pieces, of_piece)
    return [torch.randn(shape, device=DEVICE, generator=generator).to(dtype) for _ in range(ranks)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_sums_of_mixed_sizes_over_many_epochs(bounded, count, dtype):
    rng, ranks = random.Random(count), Ranks(count)
    for _ in range(20):
        several = [drawn(rng, count, dtype) for _ in range(25)]
        for outs, addends in zip(ranks.sums(several), several, strict=True):
            assert_sums(outs, addends)


@pytest.mark.gpu
def test_sums_of_mixed_dtypes_are_the_same_again(bounded):
    rng, ranks = random.Random(1), Ranks(2)
    several = [drawn(rng, 2) for _ in range(40)]
    first, again = ranks.sums(several), ranks.sums(several)
    for outs, repeated, addends in zip(first, again, several, strict=True):
        assert_sums(outs, addends)
        assert all(one.equal(other) for one, other in zip(outs, repeated, strict=True))


@pytest.mark.gpu
def test_one_rank_may_be_far_behind(bounded):
    rng, ranks = random.Random(2), Ranks(2)
    several = [drawn(rng, 2) for _ in range(12)]
    torch.cuda.synchronize()
    outs = []
    for rank in (1, 0):
        with torch.cuda.stream(ranks.streams[rank]):
            outs.append([_cuda_sums.sum_ranks(addends[rank], ranks.meetings[rank]) for addends in several])
    torch.cuda.synchronize()
    for ours, theirs, addends in zip(outs[1], outs[0], several, strict=True):
        assert_sums([ours, theirs], addends)


@pytest.mark.gpu
def test_epochs_begin_again_behind_the_last_one(bounded):
    rng, ranks = random.Random(3), Ranks(2)
    for meeting in ranks.meetings:
        meeting.epochs.fill_(-3)
    several = [drawn(rng, 2) for _ in range(8)]
    for outs, addends in zip(ranks.sums(several), several, strict=True):
        assert_sums(outs, addends)
    assert [int(meeting.epochs[0]) for meeting in ranks.meetings] == [7, 7]  # -3, -2, -1, 2, 3, 4, 5, 6


@pytest.mark.gpu
def test_addends_may_lie_as_they_like(bounded):
    ranks = Ranks(2)
    whole = [torch.randn(40, 40, device=DEVICE).bfloat16() for _ in range(2)]
    kinds = [[x.T for x in whole], [x.flatten()[1:801] for x in whole], [x[::2] for x in whole]]
    for addends in kinds:
        (outs,) = ranks.sums([addends])
        assert_sums(outs, addends)
        assert all(out.is_contiguous() for out in outs)


@pytest.mark.gpu
def test_nan_infinity_and_minus_zero(bounded):
    ranks = Ranks(2)
    ours = torch.tensor([torch.nan, torch.inf, torch.inf, -0.0, 3e38, 1.0, 0.0, 0.0], device=DEVICE)
    theirs = torch.tensor([1.0, torch.inf, -torch.inf, -0.0, 3e38, torch.nan, -0.0, 2.0], device=DEVICE)
    (outs,) = ranks.sums([[ours, theirs]])
    expected = ours + theirs
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert out.signbit()[~out.isnan()].equal(expected.signbit()[~expected.isnan()])


@pytest.mark.gpu
def test_replayed_graphs(bounded):
    """Each rank replays its own; between replays a sum is launched singly."""
    rng, ranks = random.Random(4), Ranks(2)
    several = [drawn(rng, 2) for _ in range(20)]
    graphs, kept = [], []
    for rank, (stream, meeting) in enumerate(zip(ranks.streams, ranks.meetings, strict=True)):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept.append([_cuda_sums.sum_ranks(addends[rank], meeting) for addends in several])
        graphs.append(graph)
    for _ in range(30):
        for addends in several:
            for x in addends:
                x.copy_(torch.randn(x.shape, device=DEVICE))
        for out in (*kept[0], *kept[1]):
            out.fill_(torch.nan)
        torch.cuda.synchronize()
        for stream, graph in zip(ranks.streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for *outs, addends in zip(*kept, several, strict=True):
            assert_sums(outs, addends)
        single = drawn(rng, 2)
        assert_sums(*ranks.sums([single]), single)


@pytest.mark.gpu
def test_ranks_try_whether_anything_arrives(monkeypatch):
    """Two at a time find that it does; one alone that it does not, and the device goes on."""
    ranks, alone = Ranks(2), Ranks(2)

    def tried(rank, meetings=ranks.meetings):
        with torch.cuda.stream(ranks.streams[rank]):
            return _cuda_sums.arrives(meetings[rank])

    # Memory is reserved and kernels are loaded before one rank waits for another: both may wait for the device.
    _nvrtc.module("sum_ranks.cu", _cuda_sums.rank_defines(torch.float32, 2, _cuda_sums._POLLS_OF_A_TRY, tries=True))
    with monkeypatch.context() as patch:
        patch.setattr(_cuda_sums, "_POLLS_OF_A_TRY", 1 << 10)
        assert [tried(rank, alone.meetings) for rank in range(2)] == [False, False]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(tried, range(2))) == [True, True]
    assert not tried(0)


@pytest.mark.gpu
def test_a_rank_that_is_left_alone_gives_up():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "CUDA" in done.stderr


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((8, 4096), torch.bfloat16, True),
        ((8, 8192), torch.float32, True),
        ((8, 8193), torch.float32, False),
        ((4,), torch.float16, True),
        ((3,), torch.float16, False),
        ((0, 8), torch.float16, False),
        ((8, 64), torch.float64, False),
        ((8, 64), torch.int32, False),
    ],
)
def test_which_messages_are_taken(shape, dtype, taken):
    assert _cuda_sums.sums(torch.empty(shape, dtype=dtype)) is taken


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_source_compiles_without_a_device(ranks):
    pytest.importorskip("cuda.core")
    for dtype in DTYPES:
        for tries in (False, True):
            defines = _cuda_sums.rank_defines(dtype, ranks, _cuda_sums.POLLS, tries=tries)
            assert _nvrtc.cubin("sum_ranks.cu", defines, "sm_90")[:4] == b"\x7fELF"
