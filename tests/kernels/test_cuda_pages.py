"""The CUDA page kernels against the reference, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvloom.codecs import group as grouped
from kvloom.codecs import rotated, signs
from kvloom.errors import CacheError, KernelError
from kvloom.kernels import _cuda_pages as cuda_pages
from kvloom.kernels import _nvrtc
from kvloom.kernels._torch import TORCH
from kvloom.pages import Format, Grouping, PageLayout, page_layout
from tests.kernels.codebooks import CASES, codebook_formats

ON_GPU = pytest.mark.gpu
BITS = (1, 2, 3, 4, 5, 6, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPINGS: tuple[Grouping, ...] = ("per_channel", "per_token")


def states(layout: PageLayout, dtype: torch.dtype, *, pages: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values with an outlying channel and token, a constant page end and numbers near zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 2, pages * layout.page_tokens, layout.head_dim, generator=g)
    x[..., 3] += 20
    x[..., 5, :] *= 300
    x[..., 16:32, :] *= 1e-6
    x[..., -16:, :] = 0.3
    key, value = without_negative_zero(x.to(dtype))
    return key, value


def without_negative_zero(x: torch.Tensor) -> torch.Tensor:
    """Which zero is the least of a group that has both signs depends on the order the reference compares in."""
    return x + 0.0


def assert_same(layout: PageLayout, key: torch.Tensor, value: torch.Tensor) -> None:
    """The device's records and numbers are the reference's on the CPU."""
    expected = TORCH.encode(key.cpu(), value.cpu(), layout)
    data = cuda_pages.encode(key.cuda(), value.cuda(), layout)
    assert torch.equal(data.cpu(), expected)
    wanted = TORCH.decode(expected, layout, key.dtype)
    for got, want in zip(cuda_pages.decode(data, layout, key.dtype), wanted, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got.cpu(), want)


@ON_GPU
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [48, 64, 80, 128, 240])
def test_every_width_and_head_size(bits: int, head_dim: int) -> None:
    for key, value in itertools.permutations(GROUPINGS, 2):
        sizes = {"per_channel": 64, "per_token": head_dim}
        layout = page_layout(Format(bits, key, sizes[key]), Format(bits, value, sizes[value]), head_dim)
        assert_same(layout, *states(layout, torch.float16))


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_grouping(dtype: torch.dtype, grouping: Grouping, group: int, symmetric: bool) -> None:
    fmt = Format(3, grouping, group, symmetric)
    for page_tokens in (0, 256):
        layout = page_layout(fmt, fmt, 256, page_tokens=page_tokens)
        assert_same(layout, *states(layout, dtype, pages=1))


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("case", range(CASES))
def test_points_of_a_codebook_are_unpacked(case: int, head_dim: int, dtype: torch.dtype) -> None:
    layout = page_layout(*codebook_formats(case, head_dim), head_dim, dtype.itemsize)
    key, value = states(layout, dtype)
    data = TORCH.encode(key, value, layout)
    for got, want in zip(cuda_pages.decode(data.cuda(), layout, dtype), TORCH.decode(data, layout, dtype), strict=True):
        assert torch.equal(got.cpu(), want)


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_passthrough_side_is_copied(dtype: torch.dtype) -> None:
    plain, packed = Format(16, "per_token", 64), Format(2, "per_channel", 32)
    for key, value in ((plain, packed), (packed, plain), (plain, plain)):
        layout = page_layout(key, value, 64, dtype.itemsize)
        assert_same(layout, *states(layout, dtype))


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_ends_of_fp16(dtype: torch.dtype, symmetric: bool) -> None:
    end = 65280.0 if dtype == torch.bfloat16 else 65504.0
    for bits in (1, 2, 8):
        fmt = Format(bits, "per_token", 32, symmetric)
        layout = page_layout(fmt, fmt, 64)
        key, value = states(layout, torch.float32)
        assert_same(layout, (key * 5e4).clamp(-end, end).to(dtype), without_negative_zero((value * 1e-7).to(dtype)))


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [128, 144, 129])
def test_strided_states_and_a_page_store(dtype: torch.dtype, inner: int) -> None:
    layout = page_layout(Format(4, "per_channel", 64), Format(5, "per_token", 128), 128)
    key, value = states(layout, dtype, pages=3)
    held = [torch.full((2, 192, 2, inner), torch.nan, dtype=dtype, device="cuda") for _ in range(2)]
    strided = [x[..., inner - 128 :].transpose(1, 2) for x in held]
    for x, source in zip(strided, (key, value), strict=True):
        x.copy_(source)
    store = torch.full((2, 3, 9, layout.nbytes), 90, dtype=torch.uint8, device="cuda")
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    cuda_pages.encode_into(strided[0], strided[1], layout, store[:, 1:, 2:5], flag)
    assert not flag.item()
    expected = torch.full(store.shape, 90, dtype=torch.uint8)
    expected[:, 1:, 2:5] = TORCH.encode(key, value, layout)
    assert torch.equal(store.cpu(), expected)
    for got, want in zip(
        cuda_pages.decode(store[:, 1:, 3:5], layout, dtype),
        TORCH.decode(expected[:, 1:, 3:5], layout, dtype),
        strict=True,
    ):
        assert torch.equal(got.cpu(), want)


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 7e4])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_what_fp16_cannot_scale_is_said(dtype: torch.dtype, bad: float, grouping: Grouping) -> None:
    fmt, plain = Format(4, grouping, 64), Format(16, grouping, 64)
    layout = page_layout(fmt, fmt, 64)
    key, value = (x.cuda() for x in states(layout, dtype))
    for x in (key, value):
        kept = x[1, 1, 70, 33].clone()
        x[1, 1, 70, 33] = bad
        with pytest.raises(CacheError, match="65504"):
            cuda_pages.encode(key, value, layout)
        x[1, 1, 70, 33] = kept
    cuda_pages.encode(key, value, layout)
    key[0, 0, 0, 0] = bad
    cuda_pages.encode(key, value, page_layout(plain, fmt, 64, dtype.itemsize))


@ON_GPU
def test_no_pages_and_no_launch() -> None:
    layout = page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 64), 64)
    key = torch.empty(2, 2, 0, 64, device="cuda")
    data = cuda_pages.encode(key, key, layout)
    assert data.shape == (2, 2, 0, layout.nbytes)
    assert cuda_pages.decode(data, layout, torch.float32)[0].shape == key.shape


def test_what_the_kernels_do_not_cover_is_refused() -> None:
    fmt = Format(4, "per_channel", 64)
    x = torch.zeros(1, 1, 64, 64)
    layout = page_layout(fmt, fmt, 64)
    with pytest.raises(KernelError, match="float64"):
        cuda_pages.encode(x.double(), x.double(), layout)
    with pytest.raises(KernelError, match="head_dim up to 256"):
        cuda_pages.decode(torch.zeros(1), page_layout(fmt, fmt, 272), torch.float32)
    with pytest.raises(KernelError, match="another compute dtype"):
        cuda_pages.encode(x, x, page_layout(Format(16, "per_channel", 64), fmt, 64, itemsize=2))
    with pytest.raises(KernelError, match="groups of 8"):
        cuda_pages.encode(x, x, page_layout(fmt, Format(4, "per_token", 8), 64))


def test_the_encoder_says_what_it_does_not_know() -> None:
    plain = Format(4, "per_channel", 64)
    for codec, both in (("affine", True), ("clipped", True), ("lloyd", True), ("hqq", False), ("quanto", False)):
        layout = page_layout(plain, Format(4, "per_token", 64, codec == "lloyd", codec), 64)
        assert cuda_pages.decodes(layout, torch.float16)
        assert cuda_pages.encodes(layout, torch.float16) == both
    x = torch.zeros(1, 1, 64, 64)
    with pytest.raises(KernelError, match="not 'quanto'"):
        cuda_pages.encode(x, x, layout)
    large = Format(4, "per_channel", 256, codec="clipped")
    layout = page_layout(large, large, 256)
    assert cuda_pages.encodes(page_layout(Format(4, "per_channel", 256), plain, 256), torch.float32)
    assert not cuda_pages.encodes(layout, torch.float32)


SEARCHED = [
    *({"codec": "clipped", "bits": bits, "symmetric": even} for bits in BITS for even in (False, True)),
    *({"codec": "lloyd", "bits": bits, "symmetric": True} for bits in (1, 2, 3, 4)),
    *({"codec": "nuq", "bits": b, "codebook": tuple(i / 2 ** (b - 1) - 0.9 for i in range(2**b))} for b in (2, 3, 4)),
]


def squared_errors(x: torch.Tensor, decoded: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Of each group, float64."""
    return grouped((x.double() - decoded.double()).square(), fmt).sum(-1)


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SEARCHED, ids=lambda o: "{codec}-{bits}".format(**o))
def test_searched_grids_are_the_references(options, dtype: torch.dtype) -> None:
    for head_dim, group in ((64, 64), (80, 16), (96, 32), (128, 128), (240, 64)):
        channel = Format(grouping="per_channel", group_size=group, **options)
        token = Format(grouping="per_token", group_size=16 if group == 16 else head_dim, **options)
        for formats in ((channel, token), (token, channel)):
            layout = page_layout(*formats, head_dim, dtype.itemsize)
            sides = states(layout, dtype)
            expected = TORCH.encode(*sides, layout)
            data = cuda_pages.encode(*(x.cuda() for x in sides), layout).cpu()
            if options["codec"] == "nuq":
                assert torch.equal(data, expected)
                continue
            assert (data == expected).float().mean() > 0.97
            for x, ours, theirs, fmt in zip(
                sides, *(TORCH.decode(d, layout, torch.float32) for d in (data, expected)), formats, strict=True
            ):
                error, other = squared_errors(x, ours, fmt), squared_errors(x, theirs, fmt)
                assert error.sum() <= other.sum() * (1 + 1e-3)
                # Where sums are rounded, a step of fp16 more or less: 2^-11 of 255 levels is an eighth of one.
                worse = 1.1 if options["bits"] == 8 else 1.02
                assert (error <= other * worse + 1e-10).all()


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 240, 256])
def test_turning_is_the_references(head_dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 7, 3, head_dim, generator=g).to(dtype).transpose(1, 2)
    expected = rotated(x, signs("hadamard", head_dim))
    assert torch.equal(cuda_pages.rotate(x.cuda()).cpu(), expected)
    assert torch.equal(cuda_pages.rotate(x.cuda()[:, :, 2:3]).cpu(), expected[:, :, 2:3])
    assert cuda_pages.rotate(x.cuda()[:, :, :0]).shape == (2, 3, 0, head_dim)


def test_kernels_of_searches_and_turns_compile_without_a_device() -> None:
    pytest.importorskip("cuda.core")
    clipped = Format(3, "per_channel", 64, codec="clipped", rotation="hadamard")
    lloyd = Format(2, "per_token", 80, True, codec="lloyd")
    for append in (False, True):
        defines = cuda_pages.encode_defines(page_layout(clipped, lloyd, 80), torch.bfloat16, append=append)
        assert _nvrtc.cubin("encode.cu", defines, "sm_80")[:4] == b"\x7fELF"
    assert _nvrtc.cubin("rotate.cu", cuda_pages.rotate_defines(torch.float16, 80), "sm_80")[:4] == b"\x7fELF"


def test_outliers_are_not_left_out() -> None:
    plain, kept = (Format(4, "per_channel", 64, outliers=n) for n in (0.0, 0.01))
    layout = page_layout(plain, kept, 64)
    assert not cuda_pages.encodes(layout, torch.float16)
    assert not cuda_pages.decodes(layout, torch.float16)


def test_what_does_not_fit_is_refused() -> None:
    fmt = Format(4, "per_channel", 64)
    layout = page_layout(fmt, fmt, 64)
    x = torch.zeros(1, 1, 64, 64)
    with pytest.raises(ValueError, match="differ"):
        cuda_pages.encode(x, x.half(), layout)
    with pytest.raises(ValueError, match="whole pages"):
        cuda_pages.encode(x[:, :, 1:], x[:, :, 1:], layout)
    with pytest.raises(ValueError, match="are not uint8"):
        cuda_pages.encode_into(x, x, layout, torch.zeros(1, 1, 2, layout.nbytes, dtype=torch.uint8))
    shifted = torch.zeros(1, 1, 1, layout.nbytes + 1, dtype=torch.uint8)[..., 1:]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        cuda_pages.encode_into(x, x, layout, shifted)
    with pytest.raises(ValueError, match="are not uint8"):
        cuda_pages.decode(torch.zeros(1, 1, layout.nbytes, dtype=torch.uint8), layout, torch.float32)
