"""Scaled Lloyd-Max grids: the theoretical error on normal elements, and the better of two scales on any."""

from __future__ import annotations

import pytest
import torch

from kvloom.codecs import LLOYD, Encoded
from kvloom.codecs import _lloyd as lloyd
from kvloom.codecs._half import half_near
from kvloom.errors import CacheError
from kvloom.pages import Format
from tests.codecs.tensors import GROUPINGS, SAMPLES, decoded, relative, rows
from tests.codecs.test_normal_codebooks import WIDTHS, distortion, points_of

GROUPS = [(grouping, size) for grouping in ("per_token", "per_channel") for size in (64, 128)]


def formats(bits: int, grouping: str, size: int) -> tuple[Format, Format]:
    """Lloyd's and the symmetric min/max format of the same bytes."""
    ours, plain = (Format(bits, grouping, size, True, codec) for codec in ("lloyd", "affine"))
    return ours, plain


def many() -> torch.Tensor:
    return torch.randn(8, 512, 128, generator=torch.Generator().manual_seed(5))


def by_root_mean_square(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """TurboQuant-MSE, slowly: squared error of each group with the norm kept in fp16, fp64."""
    groups = rows(x, fmt).double()
    scale = half_near(groups.square().mean(-1, keepdim=True).sqrt()).double()
    points = scale * torch.tensor(points_of(fmt.bits), dtype=torch.float64)
    return (groups[..., None] - points[:, None]).square().amin(-1).sum(-1)


def errors(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Squared error of each group, fp64."""
    return rows(decoded(x, fmt).double() - x, fmt).square().sum(-1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("grouping", "size"), GROUPS)
def test_normal_elements_lose_what_theory_says(grouping: str, size: int, bits: int) -> None:
    """A little less in small groups, whose own norm leaves the coordinates shorter tails than normal ones have."""
    x, (fmt, _) = many(), formats(bits, grouping, size)
    kept_norm = float(by_root_mean_square(x[:2], fmt).sum() / x[:2].double().square().sum())
    assert (0.94 if size == 64 else 0.96) < kept_norm / distortion(bits) < 1
    assert (0.9 if size == 64 else 0.93) < relative(decoded(x, fmt), x) ** 2 / distortion(bits) < 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_large_groups_of_normal_elements_lose_the_distortion_of_the_grid(bits: int) -> None:
    x = many().view(128, 4096)
    assert relative(decoded(x, Format(bits, "per_token", 4096, True, "lloyd")), x) ** 2 == pytest.approx(
        distortion(bits), rel=0.02
    )


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.45), (3, 0.7), (4, 0.88)])
@pytest.mark.parametrize(("grouping", "size"), GROUPS)
def test_it_beats_symmetric_min_max_on_normal_elements(grouping: str, size: int, bits: int, gain: float) -> None:
    x = many()
    ours, plain = (relative(decoded(x, fmt), x) ** 2 for fmt in formats(bits, grouping, size))
    assert ours < gain * plain


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("grouping", "size"), GROUPINGS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_no_group_has_a_larger_error_than_with_its_norm(sample: str, grouping: str, size: int, bits: int) -> None:
    x, (fmt, _) = SAMPLES[sample](), formats(bits, grouping, size)
    assert bool((errors(x, fmt) <= by_root_mean_square(x, fmt) * (1 + 1e-4)).all())
    assert float(errors(x, fmt).sum()) < float(by_root_mean_square(x, fmt).sum())


def test_the_other_scale_is_that_of_least_squares() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    points = torch.tensor(points_of(2)).float()[torch.randint(4, (64, 32))]
    scale = lloyd.least_squares(x, points).double()
    best = (x.double() - scale[:, None] * points).square().sum(-1)
    for factor in (0.99, 1.01):
        assert bool((best < (x.double() - factor * scale[:, None] * points).square().sum(-1)).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_the_nearest_points_of_decoding(bits: int) -> None:
    x, fmt = SAMPLES["heavy"](), Format(bits, "per_token", 32, True, "lloyd")
    encoded = LLOYD.encode(x, fmt)
    best = (LLOYD.decode(encoded, fmt) - x).abs()
    for step in (-1, 1):
        codes = (encoded.codes.int() + step).clamp(0, fmt.levels).to(torch.uint8)
        other = (LLOYD.decode(Encoded(codes, encoded.params), fmt) - x).abs()
        assert bool((best <= other + 1e-6 * x.abs()).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_constant_groups_come_back(bits: int) -> None:
    fmt = Format(bits, "per_channel", 64, True, "lloyd")
    for value in (0.0, 1.0, -3.25, 0.1, 1234.5, 1e-9):
        x = torch.full((64, 16), value)
        assert torch.allclose(decoded(x, fmt), x, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 70000.0])
def test_what_has_no_finite_code_is_refused(bad: float) -> None:
    x = torch.randn(64, 64)
    x[5, 7] = bad
    with pytest.raises(CacheError, match="NaN, infinity or a magnitude above 65504"):
        LLOYD.encode(x, Format(4, "per_token", 64, True, "lloyd"))


def test_extremes_of_fp16_are_packed() -> None:
    x = 65504 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).sign()
    for bits in WIDTHS:
        out = decoded(x, Format(bits, "per_token", 64, True, "lloyd"))
        assert torch.allclose(out, x, rtol=0.25)  # the scale that gives 65504 lies beyond fp16
