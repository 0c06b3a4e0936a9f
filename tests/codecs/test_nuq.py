"""KVQuant's normalisation and look-up against the obvious way, and what cannot be coded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.codecs import NUQ
from kvloom.errors import CacheError, PlanError
from kvloom.pages import Format
from tests.codecs.tensors import GROUPINGS, SAMPLES, decoded, rows

POINTS = {
    2: (-0.93, -0.11, 0.3, 0.81),
    3: (-1.0, -0.5, -0.25, -0.1, 0.0, 0.2, 0.4, 1.0),
    4: tuple(np.linspace(-1, 1, 16) ** 3),
}


def kvquant(values: np.ndarray, points: tuple[float, ...]) -> np.ndarray:
    """One group, float64, element by element: parameters and points in fp16, scale rounded up."""
    zero = np.float64(np.float16((values.max() + values.min()) / 2))
    exact = max(values.max() - zero, zero - values.min())
    scale = np.float16(exact)
    if np.float64(scale) < exact:
        scale = np.nextafter(scale, np.float16(np.inf))
    grid = np.array(points).astype(np.float16).astype(np.float64)
    out = [grid[np.abs((x - zero) / np.float64(scale) - grid).argmin()] if scale else 0.0 for x in values]
    return np.float64(scale) * np.array(out) + zero


@pytest.mark.parametrize("bits", POINTS)
@pytest.mark.parametrize(("grouping", "size"), GROUPINGS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_it_is_kvquants_by_hand(sample: str, grouping: str, size: int, bits: int) -> None:
    fmt = Format(bits, grouping, size, codec="nuq", codebook=POINTS[bits])
    x = SAMPLES[sample]()[:, :, :64]
    expected = np.stack([kvquant(group, POINTS[bits]) for group in rows(x, fmt).double().numpy()])
    ours = rows(decoded(x, fmt), fmt).double().numpy()
    ties = np.abs(ours - expected) > 1e-6 * np.abs(expected).max()  # two points equally near, but for rounding
    assert ties.mean() < 1e-4


@given(
    seed=st.integers(0, 2**31), bits=st.sampled_from([2, 3, 4]), scale=st.floats(1e-6, 1e4), offset=st.floats(-50, 50)
)
def test_normalised_elements_fill_minus_one_to_one(seed: int, bits: int, scale: float, offset: float) -> None:
    fmt = Format(bits, "per_token", 32, codec="nuq", codebook=POINTS[bits])
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * scale + offset
    unit, scales = NUQ.normalise(x, fmt)
    assert unit.shape == (8, 2, 32)
    assert float(unit.abs().max()) <= 1
    assert bool((unit.abs().amax(-1) > 0.99 - 1e-7 / scales[..., 0]).all())
    error = (decoded(x, fmt) - x).abs()
    assert bool((error <= NUQ.bound(x, fmt)).all())


def test_elements_on_the_grid_come_back() -> None:
    fmt = Format(3, "per_token", 64, codec="nuq", codebook=POINTS[3])
    points = torch.tensor(fmt.points)
    codes = torch.randint(8, (64, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 7  # both ends in each group
    x = points[codes] * 4 - 3
    assert decoded(x, fmt).equal(x)


def test_without_a_codebook_it_says_what_to_do() -> None:
    with pytest.raises(PlanError, match="codebook is missing, which codec 'nuq' needs: run `kvloom calibrate`"):
        NUQ.encode(torch.randn(64, 64), Format(3, "per_token", 64, codec="nuq"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -7e4])
def test_what_fp16_cannot_express_is_refused(bad: float) -> None:
    x = torch.randn(64, 64)
    x[5, 7] = bad
    with pytest.raises(CacheError, match="NaN, infinity"):
        NUQ.encode(x, Format(2, "per_token", 64, codec="nuq", codebook=POINTS[2]))


def test_extremes_of_fp16_stay_finite() -> None:
    x = 65504 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).sign()
    fmt = Format(3, "per_token", 64, codec="nuq", codebook=POINTS[3])
    assert decoded(x, fmt).equal(x)
