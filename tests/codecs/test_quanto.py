"""The quanto codec against the library's own dequantised tensors."""

from __future__ import annotations

import pytest
import torch

from kvloom import codecs
from kvloom.pages import Format
from tests.codecs.tensors import GROUPINGS, SAMPLES, decoded, from_rows, relative, rows

quanto = pytest.importorskip("optimum.quanto")


def library(x: torch.Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What quanto makes of all groups, in ``dtype``; the codes are not packed, which would need a compiler."""
    matrix = rows(x, fmt).to(dtype)
    scale, shift = quanto.MaxOptimizer()(matrix, quanto.qtypes[f"qint{fmt.bits}"], 0, fmt.group_size)
    codes = torch.ops.quanto.quantize_affine(matrix, fmt.bits, 0, fmt.group_size, scale, shift)
    return from_rows(codes * scale - shift, x, fmt)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("grouping", "size"), GROUPINGS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_error_is_the_librarys(sample: str, grouping: str, size: int, bits: int) -> None:
    x, fmt = SAMPLES[sample](), Format(bits, grouping, size, codec="quanto")
    ours = relative(decoded(x, fmt), x)
    for dtype in (torch.float32, torch.float16):
        assert ours == pytest.approx(relative(library(x, fmt, dtype), x), rel=1e-3)


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_fp16_adds(sample: str) -> None:
    """Away from the library's tensor by the roundings of scale and zero point, and codes that these turn."""
    fmt = Format(4, "per_channel", 64, codec="quanto")
    x = SAMPLES[sample]()
    assert relative(decoded(x, fmt), library(x, fmt)) < 0.02


def test_axes_of_a_cache() -> None:
    """Quanto's own grouping of ``[batch, heads, tokens, head_dim]``: axis 0 along channels, axis -1 along tokens."""
    x, optimizer = SAMPLES["keys"](), quanto.MaxOptimizer()
    for fmt, axis in (
        (Format(4, "per_token", 32, codec="quanto"), 0),
        (Format(4, "per_channel", 64, codec="quanto"), -1),
    ):
        scale, _ = optimizer(x, quanto.qint4, axis, fmt.group_size)
        ours = codecs.QUANTO.encode(x, fmt).params[0].float()
        if axis == -1:  # quanto has the groups of a channel together
            ours = ours.flatten(0, 2).transpose(0, 1)
        assert torch.allclose(ours.flatten(), scale.flatten(), rtol=1e-3)


def test_a_single_group() -> None:
    """`MaxOptimizer.__call__` takes one row for a tensor without groups; the codec does not."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    fmt = Format(4, "per_token", 64, codec="quanto")
    assert relative(decoded(x, fmt), x) < 0.15
