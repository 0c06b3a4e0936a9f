"""KVmix's words of eleven codes: the same numbers as a slow reference with real words, their error, and their cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.codecs import KVMIX3, as_stored
from kvloom.errors import CacheError, PlanError
from kvloom.pages import Format, page_layout
from tests.codecs.tensors import SAMPLES

FMT = Format(3, "per_channel", 11, codec="kvmix3")
f32, f16 = np.float32, np.float16


def word_of(values: list[np.float32]) -> tuple[int, np.float32, np.float32]:
    """One int32 word of at most eleven elements, with the step and the least element in fp32, as KVmix computes."""
    low, high = min(values), max(values)
    step = f32(f32(high - low) / f32(7))
    word = 0
    for i, x in enumerate(values):
        ratio = f32(f32(x - low) / step) if step > 0 else f32(0)  # a GPU makes 0 of NaN
        code = int(np.floor(ratio)) + (ratio - np.floor(ratio) >= 0.5)
        word |= min(code, 7 if i < 10 else 3) << (3 * i)
    assert 0 <= word < 2**32
    return word, step, low


def slow(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``[tokens, channels]`` through words, and the bits that words, steps and minima take."""
    out, bits = np.zeros(x.shape, dtype=f32), 0
    matrix = x.numpy()
    for channel in range(x.shape[1]):
        for start in range(0, x.shape[0], 11):
            values = list(matrix[start : start + 11, channel])
            word, step, low = word_of(values)
            bits += 32 + 16 + 16
            for i in range(len(values)):
                code = word >> (3 * i) & (7 if i < 10 else 3)
                out[start + i, channel] = f32(f16(step)) * f32(code) + f32(f16(low))
    return torch.from_numpy(out), bits


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_numbers_are_those_of_its_words(sample: str) -> None:
    x = SAMPLES[sample]()[0, 0, :64, :32]
    expected, bits = slow(x)
    assert as_stored(x, FMT, 64).equal(expected)
    assert 8 * page_layout(FMT, FMT, 32).key.nbytes == bits == 6 * 64 * 32


@given(
    st.integers(0, 2**31),
    st.sampled_from([11, 22, 64, 128]),
    st.sampled_from([1.0, 1e-3, 300.0]),
    st.sampled_from([0.0, 1e3]),
)
@settings(max_examples=20)
def test_the_numbers_are_those_of_its_words_whatever_the_length(
    seed: int, tokens: int, size: float, offset: float
) -> None:
    x = size * torch.randn((tokens, 16), generator=torch.Generator().manual_seed(seed)) + offset
    x[:, 3] = 0.7
    x[:, 4] = (x[:, 4] > 0).float()
    assert KVMIX3.decode(KVMIX3.encode(x, FMT), FMT).equal(slow(x)[0])


def test_halves_go_up() -> None:
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.0, 1.0, 2.5])[:, None].expand(11, 16)
    assert KVMIX3.encode(x, FMT).codes[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 1, 3]


def test_every_eleventh_token_is_cut_off() -> None:
    x = torch.zeros(64, 16)
    x[::2] = 7.0
    stored = as_stored(x, FMT, 64)
    assert stored[10::11].equal((x[10::11] > 0) * 3.0)
    stored[10::11] = x[10::11]
    assert stored.equal(x)


def test_normal_elements_lose_what_the_docstring_says() -> None:
    x = torch.randn(8, 64, 11 * 64, 16, generator=torch.Generator().manual_seed(0))
    whole = (KVMIX3.decode(KVMIX3.encode(x, FMT), FMT) - x).square()
    assert float(whole.mean()) == pytest.approx(0.080, abs=0.001)
    paged = (as_stored(x, FMT, 64) - x).square().unflatten(2, (-1, 64))
    assert float(paged.mean()) == pytest.approx(0.070, abs=0.001)
    plain = Format(3, "per_channel", 32)
    assert float((as_stored(x, plain, 64) - x).square().mean()) == pytest.approx(0.028, abs=0.001)


@pytest.mark.parametrize("page_tokens", [64, 128, 256])
def test_a_page_takes_six_bits_an_element(page_tokens: int) -> None:
    fmt = Format(2, "per_channel", page_tokens)
    side = page_layout(FMT, fmt, 128).key
    assert 8 * side.nbytes == -(-page_tokens // 11) * (32 + 32) * 128
    assert side.groups == -(-page_tokens // 11)
    assert 8 * page_layout(FMT, FMT, 128).key.nbytes == 6 * 64 * 128


@pytest.mark.parametrize(
    ("fmt", "says"),
    [
        (Format(4, "per_channel", 11, codec="kvmix3"), r"bits 4 is not one of \(3,\)"),
        (Format(3, "per_channel", 32, codec="kvmix3"), "group_size 32 per_channel is not for codec 'kvmix3'"),
        (Format(3, "per_token", 11, codec="kvmix3"), "group_size 11 per_token is not for codec 'kvmix3'"),
        (Format(3, "per_channel", 11, True, codec="kvmix3"), "symmetric is not for codec 'kvmix3'"),
    ],
)
def test_other_formats_are_refused(fmt: Format, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        KVMIX3.encode(torch.randn(64, 64), fmt)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70000.0])
def test_what_has_no_finite_code_is_refused(bad: float) -> None:
    x = torch.randn(64, 16)
    x[-1, 7] = bad
    with pytest.raises(CacheError, match="NaN, infinity or a magnitude above 65504"):
        KVMIX3.encode(x, FMT)
