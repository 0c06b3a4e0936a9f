"""Calibrated rotations: a pair that cancels, the least error there is, and moments that are not nice."""

from __future__ import annotations

import pytest
import torch

from kvloom.codecs import as_stored, dual_of, fitted, rotated, signs
from kvloom.errors import PlanError
from kvloom.pages import Format

DIMS = [16, 48, 64, 80, 128]


def moments(head_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of states whose channels grow and of readers whose directions are others, float64 ``[3, head_dim, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, head_dim, dtype=torch.float64)
    x, y, mix = (torch.randn(3, n, head_dim, generator=generator).double() for n in (500, 500, head_dim))
    x, y = x * scale, (y * scale) @ torch.linalg.qr(mix).Q
    return x.mT @ x, y.mT @ y


def cost(forward: torch.Tensor, states: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """Variance of each cached channel times what its readers make of an error in it, summed."""
    back = torch.linalg.inv(forward.double()).mT
    ours, theirs = forward.double().mT @ states @ forward.double(), back.mT @ readers @ back
    return (ours.diagonal(dim1=-2, dim2=-1) * theirs.diagonal(dim1=-2, dim2=-1)).sum(-1)


@pytest.mark.parametrize("head_dim", DIMS)
def test_the_pair_cancels(head_dim: int) -> None:
    forward = fitted(*moments(head_dim))
    assert (forward.dtype, forward.shape) == (torch.float16, (3, head_dim, head_dim))
    product = forward.double() @ dual_of(forward).mT
    torch.testing.assert_close(product, torch.eye(head_dim, dtype=torch.float64).expand(3, -1, -1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("head_dim", DIMS)
def test_nothing_costs_much_less(head_dim: int) -> None:
    states, readers = moments(head_dim)
    least = torch.linalg.eigvals(states @ readers).real.clamp(min=0).sqrt().sum(-1).square() / head_dim
    ours = cost(fitted(states, readers), states, readers)
    eye = torch.eye(head_dim, dtype=torch.float64)
    eigen = torch.linalg.eigh(readers).eigenvectors
    others = [eye, rotated(eye, signs("hadamard", head_dim)), eigen, torch.linalg.eigh(states).eigenvectors]
    assert bool((ours < 1.2 * least).all())
    for other in others:
        assert bool((ours < 0.9 * cost(other, states, readers)).all())


def test_the_size_of_the_states_is_kept_and_that_of_the_readers_is_nothing() -> None:
    states, readers = moments(64)
    forward = fitted(states, readers)
    assert torch.equal(forward, fitted(states, 1e6 * readers))
    turned = (forward.double().mT @ states @ forward.double()).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(turned, states.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=0.01, atol=0)


@pytest.mark.parametrize("case", ["nothing seen", "one direction seen", "one channel only"])
def test_directions_that_calibration_did_not_meet_are_not_lost(case: str) -> None:
    states, readers = moments(64)
    if case == "nothing seen":
        states, readers = torch.zeros_like(states), torch.zeros_like(readers)
    elif case == "one direction seen":
        readers = torch.ones_like(readers)
    else:
        states = torch.zeros_like(states)
        states[:, 5, 5] = 1e4
    forward = fitted(states, readers)
    assert bool(forward.isfinite().all())
    assert float(torch.linalg.cond(forward.double()).max()) < 1e3


def test_a_format_alone_cannot_be_turned() -> None:
    with pytest.raises(PlanError, match="takes its matrices from a plan"):
        as_stored(torch.zeros(64, 16), Format(4, "per_token", 16, rotation="calibrated"), 64)
