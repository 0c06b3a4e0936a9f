"""The affine grid: its bound, its corner cases, its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import codecs
from kvloom.codecs import AFFINE
from kvloom.codecs._groups import group
from kvloom.errors import CacheError, PlanError
from kvloom.pages import Format

FORMATS = st.builds(
    Format,
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    grouping=st.sampled_from(["per_channel", "per_token"]),
    group_size=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
)


@given(fmt=FORMATS, seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), offset=st.floats(-100, 100))
@settings(max_examples=100, deadline=None)
def test_every_element_is_within_half_a_step(fmt: Format, seed: int, scale: float, offset: float) -> None:
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(seed)) * scale + offset
    encoded = AFFINE.encode(x, fmt)
    error = group((AFFINE.decode(encoded, fmt) - x).abs(), fmt).amax(-1)
    step = encoded.params[0].float()
    rounding = 4e-7 * x.abs().max()  # of the fp32 arithmetic itself
    assert bool((error <= 0.5 * step + rounding).all())
    extreme = group(x, fmt).abs().amax(-1)
    spread = 2 * extreme if fmt.symmetric else group(x, fmt).amax(-1) - group(x, fmt).amin(-1)
    slack = (extreme * 2**-10 + 1e-7) / fmt.levels  # zero rounded down, scale rounded up
    assert bool((step <= spread / fmt.levels * (1 + 2**-10) + slack + 6e-8).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_constant_groups_come_back(bits: int, symmetric: bool) -> None:
    for value in (0.0, 1.0, -3.25, 0.1, 1234.5, 1e-9):
        fmt = Format(bits, "per_channel", 64, symmetric)
        x = torch.full((64, 16), value)
        decoded = AFFINE.decode(AFFINE.encode(x, fmt), fmt)
        assert torch.allclose(decoded, x, rtol=1e-3, atol=1e-7), (value, decoded[0, 0])
        assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 70000.0])
@pytest.mark.parametrize("grouping", ["per_channel", "per_token"])
def test_what_has_no_finite_code_is_refused(bad: float, grouping: str) -> None:
    x = torch.randn(64, 64)
    x[5, 7] = bad
    with pytest.raises(CacheError, match="NaN, infinity or a magnitude above 65504"):
        AFFINE.encode(x, Format(4, grouping, 64))


def test_extremes_of_fp16_are_packed() -> None:
    x = torch.linspace(-65504, 65504, 64)[:, None].expand(64, 16).contiguous()
    decoded = AFFINE.decode(AFFINE.encode(x, Format(8, "per_channel", 64)), Format(8, "per_channel", 64))
    assert float((decoded - x).abs().max()) <= 65504 / 255 * 1.01


def test_low_precision_and_double_inputs_give_the_codes_of_their_values() -> None:
    fmt = Format(4, "per_channel", 64)
    x = torch.randn(64, 64).bfloat16()
    reference = AFFINE.encode(x.float(), fmt)
    for same in (x, x.double()):
        encoded = AFFINE.encode(same, fmt)
        assert torch.equal(encoded.codes, reference.codes)
        assert all(torch.equal(a, b) for a, b in zip(encoded.params, reference.params, strict=True))


def test_an_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"'hadamrad' is unknown; choose one of .*affine"):
        codecs.get("hadamrad")
