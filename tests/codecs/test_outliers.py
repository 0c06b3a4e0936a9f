"""Outliers: the elements a slow reference finds farthest outside, kept exactly, and scales that do not see them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import _extras, codecs
from kvloom.codecs import as_stored, joined, split
from kvloom.codecs._half import half_near
from kvloom.errors import CacheError
from kvloom.pages import Format, codec_facts, num_outliers, page_tokens_of
from tests.codecs.tensors import SAMPLES, decoded, relative
from tests.pages.reference import split_outliers

COUNT = 40
GROUPINGS = [("per_channel", 64), ("per_channel", 16), ("per_channel", 128), ("per_token", 16), ("per_token", 64)]


def names() -> list[str]:
    """Codecs that take outliers and can run here."""
    takers = [name for name in codecs.names() if codec_facts(name).group_size is None]
    return [name for name in takers if name not in _extras.EXTRAS or not _extras.missing(name)]


def formats(name: str) -> list[Format]:
    facts = codec_facts(name)
    codebook = tuple(i / 7.5 - 1 for i in range(16)) if facts.is_calibrated else None
    return [
        Format(4, grouping, size, symmetric, name, codebook=codebook, outliers=0.02)
        for grouping, size in GROUPINGS
        for symmetric in facts.symmetries
    ]


@pytest.mark.parametrize(("grouping", "size"), GROUPINGS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_farthest_outside_are_split_off(sample: str, grouping: str, size: int) -> None:
    fmt = Format(2, grouping, size, outliers=0.01)
    page = SAMPLES[sample]()[0, 0, : page_tokens_of(fmt), :]
    count = num_outliers(fmt, 64, len(page))
    dense, outliers = split(page, fmt, count)
    kept, rest = split_outliers(page.numpy(), fmt, count)
    assert outliers.index.tolist() == list(kept)
    assert outliers.values.equal(torch.tensor(list(kept.values())).half())
    assert dense.equal(torch.from_numpy(rest))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([4, 12, 40, 128]),
    st.sampled_from(GROUPINGS),
    st.sampled_from([1.0, 0.0, 1e-6]),
)
@settings(max_examples=15)
def test_ties_go_to_the_first(seed: int, count: int, groups: tuple[str, int], size: float) -> None:
    """Few different elements, so that most distances are equal, or constant groups."""
    fmt = Format(2, *groups, outliers=0.01)
    page = size * torch.randint(-2, 3, (page_tokens_of(fmt), 64), generator=torch.Generator().manual_seed(seed)).float()
    _, outliers = split(page, fmt, count)
    kept, _ = split_outliers(page.numpy(), fmt, count)
    assert outliers.index.tolist() == list(kept)


@pytest.mark.parametrize("name", names())
def test_they_come_back_whatever_the_codec(name: str) -> None:
    for fmt in formats(name):
        x = SAMPLES["heavy"]()
        size = page_tokens_of(fmt)
        stored = as_stored(x, fmt, size)
        pages, again = x.unflatten(-2, (-1, size)), stored.unflatten(-2, (-1, size)).flatten(-2)
        _, outliers = split(pages, fmt, num_outliers(fmt, 64, size))
        assert again.gather(-1, outliers.index).equal(pages.flatten(-2).gather(-1, outliers.index).half().float())
        assert relative(stored, x) < 0.9 * relative(decoded(x, fmt), x)


@pytest.mark.parametrize("name", names())
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 60000.0))
@settings(max_examples=10)
def test_their_size_does_not_move_the_others(name: str, seed: int, far: float) -> None:
    """A page whose planted outliers grow keeps every other byte it has."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((64, 64), generator=generator)
    tokens, channels = (torch.randperm(64, generator=generator)[:COUNT] for _ in range(2))
    places = 64 * tokens + channels  # no two in one group
    pages = [x.flatten().scatter(0, places, x.new_full((COUNT,), size)).view(64, 64) for size in (10, 10 + far)]
    for fmt in formats(name):
        if page_tokens_of(fmt) == 64:
            dense, outliers = zip(*(split(page, fmt, COUNT) for page in pages), strict=True)
            assert all(kept.index.equal(places.sort().values) for kept in outliers)
            assert dense[0].equal(dense[1])
            assert bool((outliers[1].values == half_near(torch.tensor(10 + far))).all())


@pytest.mark.parametrize(("grouping", "size"), GROUPINGS)
def test_a_page_has_the_same_outliers_alone_and_among_others(grouping: str, size: int) -> None:
    fmt = Format(2, grouping, size, outliers=0.05)
    page = page_tokens_of(fmt)
    x = torch.randn((2, 3, 4, page, 64), generator=torch.Generator().manual_seed(1))
    dense, outliers = split(x, fmt, 40)
    for at in [(0, 0, 0), (1, 2, 3)]:
        alone, own = split(x[at].clone(), fmt, 40)
        assert alone.equal(dense[at])
        assert own.index.equal(outliers.index[at])
    turned, again = split(x.transpose(-1, -2).contiguous().transpose(-1, -2), fmt, 40)
    assert turned.equal(dense)
    assert again.index.equal(outliers.index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    fmt = Format(3, "per_channel", 64, outliers=0.02)
    x = SAMPLES["keys"]()[:, :, :64].to(dtype)
    stored = as_stored(x, fmt, 64)
    assert stored.dtype == torch.float32
    assert relative(stored, x.float()) < relative(decoded(x, fmt), x.float())


def test_joined_is_the_inverse_of_split() -> None:
    x = SAMPLES["heavy"]().half().float()[:, :, :64]
    dense, outliers = split(x, Format(2, "per_token", 32, outliers=0.1), 400)
    assert not dense.equal(x)
    assert joined(dense, outliers).equal(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 70000.0])
def test_what_has_no_code_is_no_outlier_either(bad: float) -> None:
    x = torch.randn(64, 64)
    x[3, 5] = bad
    with pytest.raises(CacheError, match="NaN, infinity or a magnitude above 65504"):
        split(x, Format(4, "per_channel", 64, outliers=0.01), 40)
