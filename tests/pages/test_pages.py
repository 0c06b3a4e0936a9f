"""The page format: bit for bit against the slow encoder, no wasted bit, exact sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.kernels import backend
from kvloom.pages import (
    Format,
    Plane,
    codebook_points,
    layouts_of,
    pack_outliers,
    page_layout,
    page_tokens_of,
    side_matrix,
    source_index,
    unpack_outliers,
    unpack_params,
    unpack_side,
)
from kvloom.pages._handle import _text_of
from tests.kernels.codebooks import CASES, codebook_formats
from tests.pages.reference import encode_side, fragment_bit

BITS = (1, 2, 3, 4, 5, 6, 8)
HEAD_DIMS = (16, 64, 80, 96, 128, 256)


@st.composite
def formats(draw: st.DrawFn, head_dim: int) -> Format:
    grouping = draw(st.sampled_from(["per_channel", "per_token"]))
    divisors = [s for s in (16, 32, 64, 128, head_dim) if head_dim % s == 0]
    sizes = [16, 32, 64, 128, 256] if grouping == "per_channel" else divisors
    bits, size, symmetric = draw(st.sampled_from(BITS)), draw(st.sampled_from(sizes)), draw(st.booleans())
    return Format(bits, grouping, size, symmetric, outliers=draw(st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.01])))


@given(data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_encoder_equals_the_obvious_one_bit_for_bit(data: st.DataObject, seed: int) -> None:
    head_dim = data.draw(st.sampled_from(HEAD_DIMS[:4]))
    key, value = data.draw(formats(head_dim)), data.draw(formats(head_dim))
    layout = page_layout(key, value, head_dim)
    x = torch.randn(2, layout.page_tokens, head_dim, generator=torch.Generator().manual_seed(seed)) * 3
    x[:, :, 1] += 40  # an outlier channel
    x[:, 3] = 0.7  # a constant token
    page = backend(torch.device("cpu")).encode(x[None, :1], x[None, 1:], layout)[0, 0, 0].numpy().tobytes()
    assert page == encode_side(x[0].numpy(), "key", key) + encode_side(x[1].numpy(), "value", value)
    assert len(page) == layout.nbytes


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("role", ["key", "value"])
def test_every_bit_of_a_plane_holds_one_element(role: str, bits: int, head_dim: int) -> None:
    rows, cols = (64, head_dim) if role == "key" else (head_dim, 64)
    plane = Plane(role, rows, cols, bits, 0, 0)
    index = source_index(plane)
    assert index.size * bits == 8 * plane.nbytes == rows * cols * bits
    assert np.array_equal(np.sort(index.ravel()), np.arange(rows * cols))
    for element in range(0, rows * cols, 37):
        byte, field = np.argwhere(index == element)[0]
        assert 8 * byte + bits * field == fragment_bit(role, rows, cols, bits, element // cols, element % cols)


def test_the_documented_layout_of_head_dim_128() -> None:
    """page-format.md: keys [m-tile][lane][row-half][bits words], channel 32t + (w*KJ + j)*2 + h at bit b*j + 16h."""
    for bits in (2, 4):
        index = source_index(Plane("key", 64, 128, bits, 0, 0))
        per_half = 16 // bits
        for mtile, lane, r, w, j, h in [(0, 0, 0, 0, 0, 0), (1, 7, 1, bits - 1, per_half - 1, 1), (3, 31, 0, 1, 1, 0)]:
            g, t = divmod(lane, 4)
            bit = 32 * (((mtile * 32 + lane) * 2 + r) * bits + w) + bits * j + 16 * h
            element = index[bit // 8, bit % 8 // bits]
            assert divmod(int(element), 128) == (16 * mtile + 8 * r + g, 32 * t + (w * per_half + j) * 2 + h)
    assert page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 128), 128).nbytes == 8960
    assert page_layout(Format(2, "per_channel", 64), Format(2, "per_token", 128), 128).nbytes == 4864


@given(data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_codes_come_back(data: st.DataObject, seed: int) -> None:
    head_dim = data.draw(st.sampled_from(HEAD_DIMS))
    fmt = data.draw(formats(head_dim))
    layout = page_layout(fmt, fmt, head_dim)
    key, value = torch.randn(2, 1, 1, 2 * layout.page_tokens, head_dim, generator=torch.Generator().manual_seed(seed))
    pages = backend(key.device).encode(key, value, layout)
    again = backend(key.device).encode(key.clone(), value.clone(), layout)
    assert torch.equal(pages, again)
    for x, side in ((key, layout.key), (value, layout.value)):
        codes, _ = unpack_side(pages, side)
        index, kept = unpack_outliers(pages, side)
        whole = x.unflatten(-2, (2, -1)).flatten(-2).half()
        assert torch.equal(kept, whole.gather(-1, index))
        assert index.shape[-1] == side.num_outliers
        assert int(codes.max()) <= fmt.levels
        matrix = codes if side.role == "key" else codes.transpose(-1, -2)
        numbers, columns, weights = side_matrix(pages, side, torch.float32)
        total = torch.zeros(matrix.shape).index_add_(-1, columns, numbers * weights)
        assert torch.equal(total, matrix.float())


@pytest.mark.parametrize("case", range(CASES))
def test_a_codebooks_matrix_is_the_points_of_its_codes(case: int) -> None:
    layout = page_layout(*codebook_formats(case, 80), 80)
    key, value = torch.randn(2, 1, 1, 2 * layout.page_tokens, 80, generator=torch.Generator().manual_seed(case))
    pages = backend(key.device).encode(key, value, layout)
    for side in (layout.key, layout.value):
        codes, (_, zero) = unpack_side(pages, side)
        expected = torch.tensor(side.fmt.points, dtype=torch.float64)[codes.int()]
        numbers, columns, weights = side_matrix(pages, side, torch.float64)
        assert numbers.equal(expected if side.role == "key" else expected.transpose(-1, -2))
        assert columns.tolist() == list(range(side.cols))
        assert weights.tolist() == [1.0] * side.cols
        assert side.fmt.symmetric != bool(zero.any())


@pytest.mark.parametrize("case", range(CASES))
def test_a_static_caches_layouts_survive_as_text(case: int) -> None:
    layout = page_layout(*codebook_formats(case, 64), 64)
    groups = (((0, 2), layout), ((1,), page_layout(layout.value.fmt, layout.key.fmt, 64)))
    assert layouts_of(_text_of(groups), 64, 2, layout.page_tokens) == groups


def test_points_are_fp16_numbers() -> None:
    fmt = Format(2, "per_token", 64, codec="nuq", codebook=(-1.0, -0.1, 0.1, 0.3))
    assert fmt.points == tuple(np.array(fmt.codebook, dtype=np.float16).astype(float))
    assert codebook_points(fmt.points, torch.device("cpu")).tolist() == list(fmt.points)
    assert (fmt.form, fmt.codebook_nbytes) == ("codebook", 8)
    own = Format(2, "per_token", 64, True, "lloyd")
    assert (own.form, own.codebook_nbytes, len(own.points)) == ("codebook", 0, 4)
    assert Format(2, "per_token", 64).points == ()
    with pytest.raises(PlanError, match="codebook is missing, which codec 'nuq' needs"):
        _ = Format(2, "per_token", 64, codec="nuq").points
    wrong = Format(2, "per_token", 64, codec="nuq", codebook=(-1.0, 1.0))
    with pytest.raises(PlanError, match="codebook needs 4 rising numbers"):
        page_layout(wrong, wrong, 64)


def test_three_bits_are_three_bits() -> None:
    fmt = Format(3, "per_channel", 64, symmetric=True)
    layout = page_layout(fmt, fmt, 128)
    assert layout.key.nbytes == 64 * 128 * 3 // 8 + 128 * 2


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (1e-9, 4), (0.01, 80), (0.01024, 84), (0.0102, 84), (0.0101, 84), (0.125, 1024)]
)
def test_outliers_are_four_bytes_each_in_whole_sixteens(share: float, count: int) -> None:
    plain, kept = (Format(2, "per_channel", 64, outliers=n) for n in (0.0, share))
    layout = page_layout(kept, plain, 128)
    assert layout.key.num_outliers == count
    assert layout.nbytes == page_layout(plain, plain, 128).nbytes + 4 * count
    assert layout.value.offset == layout.key.outliers_offset + 4 * count
    assert layout.is_readable == (count == 0)


def test_the_last_element_of_the_largest_page_has_an_index() -> None:
    fmt = Format(2, "per_channel", 256, outliers=1e-9)
    side = page_layout(fmt, fmt, 256).key
    index = torch.tensor([0, 32767, 32768, 65535])
    record = torch.cat([torch.zeros(side.outliers_offset, dtype=torch.uint8), pack_outliers(index, index.half())])
    assert unpack_outliers(record, side)[0].equal(index)


def test_outliers_do_not_read_as_parameters() -> None:
    plain, kept = (Format(2, "per_token", 64, outliers=n) for n in (0.0, 0.01))
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, ::7, 3] = 50.0
    shares = []
    for fmt in (plain, kept):
        layout = page_layout(fmt, fmt, 64)
        pages = backend(x.device).encode(x, x, layout)
        shares.append(unpack_params(pages, layout.key)[0])
    assert shares[0].shape == shares[1].shape == (1, 1, 1, 64, 1)
    assert float(shares[1].amax()) < 0.2 * float(shares[0].amax())


def test_a_page_is_as_long_as_the_largest_per_channel_group() -> None:
    assert page_tokens_of(Format(2, "per_channel", 32), Format(2, "per_token", 128)) == 64
    assert page_tokens_of(Format(2, "per_channel", 128), Format(2, "per_token", 64)) == 128
    assert page_tokens_of(Format(2, "per_token", 64), Format(4, "per_channel", 256)) == 256


@pytest.mark.parametrize(
    ("fmt", "head_dim", "names"),
    [
        (Format(4, "per_token", 64), 80, "group_size 64 does not divide head_dim 80"),
        (Format(4, "per_channel", 64), 72, "head_dim 72"),
        (Format(4, "per_channel", 48), 64, "group_size 48"),
        (Format(4, "per_channel", 11), 64, "group_size 11 is not one of"),
        (Format(3, "per_channel", 32, codec="kvmix3"), 64, "group_size 32 per_channel is not for codec 'kvmix3'"),
        (Format(3, "per_channel", 11, codec="kvmix3", outliers=0.1), 64, "outliers are not for codec 'kvmix3'"),
        (Format(4, "per_channel", 256, outliers=0.01), 512, "outliers are found by 16-bit indices, and a page of 256"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(fmt: Format, head_dim: int, names: str) -> None:
    with pytest.raises(PlanError, match=names):
        page_layout(fmt, fmt, head_dim)
