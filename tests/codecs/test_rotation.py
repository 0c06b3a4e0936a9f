"""Rotations are exact, the same everywhere, and undone where they must be."""

from __future__ import annotations

import pytest
import torch

from kvloom.codecs import as_stored, dual, rotated, signs
from kvloom.errors import PlanError
from kvloom.pages import Format
from kvloom.plan import Fingerprint, Plan, TensorSpec

DIMS = [16, 48, 64, 80, 96, 128, 256]


def turn(x: torch.Tensor) -> torch.Tensor:
    return rotated(x, signs("hadamard", x.shape[-1]))


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pair_is_exact_in_every_dtype(head_dim: int, dtype: torch.dtype) -> None:
    eye = torch.eye(head_dim, dtype=dtype)
    forward, back = turn(eye), dual("hadamard", head_dim, dtype)
    assert torch.equal(forward.double() @ back.double().T, eye.double())
    assert len(forward[forward != 0].abs().unique()) == 1


@pytest.mark.parametrize("head_dim", DIMS)
def test_sums_do_not_depend_on_the_shape(head_dim: int) -> None:
    x = torch.randn(3, 2, 200, head_dim)
    whole = turn(x)
    for n in (1, 3, 64):
        pieces = [turn(part) for part in x.split(n, dim=2)]
        assert torch.equal(torch.cat(pieces, dim=2), whole)
    expected = x.double() @ turn(torch.eye(head_dim, dtype=torch.float64))
    torch.testing.assert_close(whole.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", DIMS)
def test_an_outlier_channel_is_spread_over_a_block(head_dim: int) -> None:
    x = torch.zeros(1, head_dim)
    x[0, 3] = 1.0
    turned = turn(x)
    block = head_dim & -head_dim
    assert int((turned != 0).sum()) == block
    assert len(turned[turned != 0].abs().unique()) == 1


def test_rotation_helps_where_one_channel_is_an_outlier_of_every_token() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 128, 64)
    x[..., 7] *= 20
    plain, turned = (Format(4, "per_token", 64, rotation=name) for name in (None, "hadamard"))
    error = [float((as_stored(x, fmt, 64) - x).square().mean()) for fmt in (plain, turned)]
    assert error[1] < error[0] / 4


def test_sixteen_bits_are_not_turned() -> None:
    with pytest.raises(ValueError, match="rotation has no meaning for 16 bits"):
        TensorSpec(bits=16, grouping="per_token", rotation="hadamard")
    model = Fingerprint(
        architecture="X", num_layers=1, packed_layers=(0,), num_kv_heads=1, head_dim=64, dtype="float32"
    )
    entry = {"layers": 0, "key": {"bits": 4, "grouping": "per_token", "rotation": "sideways"}}
    with pytest.raises((PlanError, ValueError), match="rotation"):
        Plan.model_validate({"model": model, "layers": [entry | {"value": entry["key"]}]})
