"""What a decode step does between attention and weights, on a GPU: norms and gates."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kvloom.kernels import _cuda_norms, _cuda_pages, _cuda_products, _cuda_sums, _nvrtc
from tests.kernels.ranks import Ranks

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float16, torch.bfloat16]
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
ours = torch.ops.kvloom


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def assert_near(out: torch.Tensor, expected: torch.Tensor, units: float) -> None:
    """Within so many roundings of the result, and of what results are on average."""
    within = (expected.abs() + expected.abs().mean()) * UNIT[out.dtype] * units
    assert bool(((out.double() - expected).abs() <= within).all())


def assert_norm(
    h: torch.Tensor, y: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> None:
    """The sum as it is rounded once, and its norm within two roundings; numbers near 0 may be subnormal."""
    assert h.equal((residual.float() + x.float()).to(x.dtype))
    exact = h.double()
    expected = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    within = expected.abs() * UNIT[x.dtype] * 2.1 + (1 + weight.double().abs()) * 2**-24
    assert bool(((y.double() - expected).abs() <= within).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [4, 68, 576, 1024, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_norms(rows: int, channels: int, dtype: torch.dtype):
    x, residual = (numbers(rows, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = numbers(channels, dtype=dtype, seed=2)
    assert _cuda_norms.norms(x, residual, weight)
    assert_norm(*ours.add_norm(x, residual, weight, 1e-5, None), x, residual, weight)


def test_a_row_with_nan_or_infinity_leaves_the_others():
    x, residual = (numbers(4, 1024, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = torch.ones(1024, dtype=torch.bfloat16, device=DEVICE)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    h, y = ours.add_norm(x, residual, weight, 1e-5, None)
    assert y[1].isnan().all()
    assert y[2].isnan().sum() == 1
    for row in (0, 3):
        assert_norm(h[row : row + 1], y[row : row + 1], x[row : row + 1], residual[row : row + 1], weight)


@pytest.mark.parametrize("channels", [6, 16388])
def test_other_norms_are_torchs(channels: int):
    x, residual = (numbers(2, channels, dtype=torch.float16, seed=seed) for seed in (0, 1))
    weight = numbers(channels, dtype=torch.float16, seed=2)
    assert not _cuda_norms.norms(x, residual, weight)
    assert_norm(*ours.add_norm(x, residual, weight, 1e-5, None), x, residual, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 4])
def test_norms_of_sums_over_ranks(count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Mixed with sums that use the same buffers, over many epochs; ranks share the GPU."""
    for module in (_cuda_sums, _cuda_norms):
        monkeypatch.setattr(module, "POLLS", 1 << 23)
    rng, ranks = random.Random(count), Ranks(count)
    weight = numbers(4096, dtype=dtype, seed=9)
    shapes = [(rng.randint(1, 8), 1024 * rng.choice([1, 4])) for _ in range(24)]
    addends = [[numbers(*shape, dtype=dtype, seed=31 * n + r) for r in range(count)] for n, shape in enumerate(shapes)]
    residuals = [numbers(*shape, dtype=dtype, seed=999 + n) for n, shape in enumerate(shapes)]

    def launch(n: int, rank: int) -> Any:
        x, meeting = addends[n][rank], ranks.meetings[rank]
        if n % 3 == 2:
            return _cuda_sums.sum_ranks(x, meeting)
        return _cuda_norms.add_norm(x, residuals[n], weight[: x.shape[1]], 1e-5, meeting)

    for shape in set(shapes):  # kernels are loaded before a rank waits for another
        _cuda_norms.add_norm(*(numbers(*shape, dtype=dtype, seed=1) for _ in range(2)), weight[: shape[1]], 1e-5)
        defines, _ = _cuda_norms._build(dtype, shape[1] // 4, count, 1 << 23)
        _nvrtc.module("add_norm.cu", defines)._prepared("add_norm", 0)
    torch.cuda.synchronize()
    outs: list[list[Any]] = [[] for _ in addends]
    for n in range(len(addends)):
        for rank, stream in enumerate(ranks.streams):
            with torch.cuda.stream(stream):
                outs[n].append(launch(n, rank))
    torch.cuda.synchronize()
    for n, (of_ranks, each) in enumerate(zip(outs, addends, strict=True)):
        total = each[0].float()
        for x in each[1:]:
            total = total + x.float()
        total = total.to(dtype)
        for out in of_ranks:
            if n % 3 == 2:
                assert out.equal(total)
            else:
                assert_norm(*out, total, residuals[n], weight[: total.shape[1]])


@pytest.mark.parametrize("seed", range(24))
def test_gated_products(seed: int):
    choose = random.Random(seed)
    dtype, rows = choose.choice(DTYPES), choose.randint(1, 8)
    channels, features = 64 * choose.choice([1, 3, 9, 22, 64]), 16 * choose.randint(1, 60)
    x = numbers(rows, channels, dtype=dtype, seed=seed)
    gate, up = (numbers(features, channels, dtype=dtype, seed=seed + n) / channels**0.5 for n in (1, 2))
    assert _cuda_products.multiplies(x, [gate, up])
    out = ours.gated_product(x, gate, up)
    expected = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert out.shape == (rows, features)
    assert_near(out, expected, 6)
    assert out.equal(ours.gated_product(x, gate, up))


def test_a_chain_of_launches_in_a_replayed_graph_is_the_one_that_waits(monkeypatch: pytest.MonkeyPatch):
    """Launches that begin early read nothing too early: fresh numbers at every replay, outputs poisoned between."""
    dtype, rows, channels = torch.bfloat16, 8, 1024
    weights = [numbers(channels, channels, dtype=dtype, seed=n) / channels**0.5 for n in range(4)]
    scale = numbers(channels, dtype=dtype, seed=8)
    x, r = (numbers(rows, channels, dtype=dtype, seed=n) for n in (20, 21))
    kept: list[torch.Tensor] = []

    def chain() -> tuple[torch.Tensor, torch.Tensor]:
        y, stream = x, r
        kept.clear()
        for _ in range(30):
            stream, y = ours.add_norm(y, stream, scale, 1e-5, None)
            query, key = ours.products(y, weights[:2], [None, scale])
            turned = _cuda_pages.rotate(query.view(rows, 8, 1, 128))
            y = ours.gated_product((turned + key.view(turned.shape)).view(rows, channels), *weights[2:])
            kept.extend([stream, y, query, key, turned])
        return stream, y

    monkeypatch.setattr(_nvrtc, "FOLLOWING_SINCE", (99, 0))
    for _ in range(2):
        chain()
    torch.cuda.synchronize()
    monkeypatch.undo()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = chain()
    made = list(kept)
    for seed in range(20):
        x.copy_(numbers(rows, channels, dtype=dtype, seed=100 + seed))
        for it in made:
            it.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        monkeypatch.setattr(_nvrtc, "FOLLOWING_SINCE", (99, 0))
        expected = chain()
        monkeypatch.undo()
        assert all(one.equal(other) for one, other in zip(outs, expected, strict=True))
        assert not outs[0].isnan().any()
