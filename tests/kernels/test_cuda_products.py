"""Products of few rows on a GPU against float64; what the kernel does not take is multiplied by torch."""

from __future__ import annotations

import random

import pytest
import torch

from kvloom.kernels import _cuda_products

pytestmark = pytest.mark.gpu
products = torch.ops.kvloom.products


def exact_enough(out, x, weight, bias=None):
    """Within the rounding of the result, and of fp32 sums."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    unit = 2**-8 if x.dtype == torch.bfloat16 else 2**-11
    within = expected.abs() * unit + (x.double().abs() @ weight.double().abs().T) * 2e-6
    return bool(((out.double() - expected).abs() <= within).all())


def drawn(seed):
    """Rows, weights and biases, some of them parts of larger matrices."""
    choose = random.Random(seed)
    dtype = choose.choice([torch.float16, torch.bfloat16])
    rows, channels = choose.randint(1, 8), 64 * choose.choice([1, 2, 3, 7, 9, 14, 22, 64])
    features = [16 * choose.randint(1, 40) for _ in range(choose.randint(1, 4))]
    padding = choose.choice([0, 8, 64])
    generator = torch.Generator("cuda").manual_seed(seed)

    def matrix(height):
        whole = torch.randn(height, channels + padding, device="cuda", generator=generator)
        return whole.to(dtype)[:, padding:]

    weights = [matrix(height) for height in features]
    biases = [choose.choice([None, 3 * matrix(height)[:, 0]]) for height in features]
    return matrix(rows), weights, biases


@pytest.mark.parametrize("seed", range(60))
def test_products_are_those_of_float64(seed):
    x, weights, biases = drawn(seed)
    assert _cuda_products.multiplies(x, weights, biases)
    outs = products(x, weights, biases)
    assert all(exact_enough(*each) for each in zip(outs, [x] * len(outs), weights, biases, strict=True))
    again = products(x, weights, biases)
    assert all(one.equal(other) for one, other in zip(outs, again, strict=True))


@pytest.mark.parametrize(
    ("rows", "channels", "features", "dtype"),
    [(9, 64, 16, torch.bfloat16), (8, 80, 16, torch.float16), (8, 64, 24, torch.float16), (2, 64, 16, torch.float32)],
)
def test_what_the_kernel_does_not_take_is_multiplied_by_torch(rows, channels, features, dtype):
    x, weight = (torch.randn(height, channels, device="cuda").to(dtype) for height in (rows, features))
    assert not _cuda_products.multiplies(x, [weight])
    (out,) = products(x, [weight], [None])
    torch.testing.assert_close(out, x @ weight.T)


def test_nan_stays_in_its_row():
    x, weights, biases = drawn(3)
    x[0, 5] = float("nan")
    (first, *_) = products(x, weights, biases)
    assert first[0].isnan().all()
    assert not first[1:].isnan().any()
