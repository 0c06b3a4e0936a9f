from __future__ import annotations

import pytest
import torch

from kvloom.bench._timing import CPU_COLD_BYTES, CPU_MAX_COPIES, LONG_SECONDS, MIN_LAUNCHES, CpuClock, clock, rounds


def test_inputs_are_cold_when_their_turn_comes_again():
    copies = CpuClock().copies(CPU_COLD_BYTES // 4)
    assert copies * (CPU_COLD_BYTES // 4) > CPU_COLD_BYTES
    assert CpuClock().copies(10 * CPU_COLD_BYTES) == 1
    assert CpuClock().copies(1) == CPU_MAX_COPIES


def test_the_cpu_clock_walks_every_launch(quick):
    seen: list[int] = []
    timing = CpuClock().time([lambda i=i: seen.append(i) for i in range(3)])
    assert seen[:3] == [0, 1, 2]  # warm-up
    assert seen[3:7] == [0, 1, 2, 0]
    assert len(seen) >= 3 + 10
    assert timing.method == "wall"
    assert 0 <= timing.p10 <= timing.seconds <= timing.p90


def test_short_launches_are_repeated_within_a_graph():
    assert [rounds(1e-5, launches) for launches in (1, 3, MIN_LAUNCHES, 500)] == [MIN_LAUNCHES, 3, 1, 1]
    assert rounds(2 * LONG_SECONDS, 1) == 1


@pytest.mark.gpu
def test_a_graph_walks_every_launch_on_a_gpu():
    device = torch.device("cuda", 0)
    counts = torch.zeros(3, device=device)
    timing = clock(device).time([lambda i=i: counts[i].add_(1) for i in range(3)])
    assert timing.method == "graph"
    assert 0 < timing.p10 <= timing.seconds <= timing.p90 < 1e-3
    assert counts.min() >= MIN_LAUNCHES / 3
    assert (counts[1:] - counts[1]).abs().max() == 0  # the first was also launched to see what it is like


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_timed_without_a_graph():
    x = torch.randn(1000, device="cuda")
    timing = clock(torch.device("cuda", 0)).time([lambda: bool(x.sum() > 0)])
    assert timing.method == "events"
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.randn(3, device="cuda").shape == (3,)


@pytest.mark.gpu
def test_a_large_copy_takes_as_long_as_its_bytes():
    device = torch.device("cuda", 0)
    x, y = (torch.randn(1 << 26, device=device) for _ in range(2))
    one = clock(device).time([lambda: y.copy_(x)]).seconds
    half = clock(device).time([lambda: y[: 1 << 25].copy_(x[: 1 << 25])]).seconds
    assert one / half == pytest.approx(2, rel=0.15)


@pytest.mark.gpu
def test_a_gpu_walks_more_than_its_cache():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert clock(torch.device("cuda", 0)).copies(1 << 20) * (1 << 20) > 4 * cache
