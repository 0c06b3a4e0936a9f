"""Dense and sparse: the outliers of a page are kept in fp16, and scales are those of the elements that remain.

KVQuant (Hooper et al., arXiv 2401.18079, "per-vector dense-and-sparse quantization") calls an element an outlier that
lies outside two quantiles of its own vector, a channel of keys or a token of values; puts the vector's median in its
place before scales are computed; and stores it apart (``get_outliers_dynamic``, ``quant_fn_zp`` in
quant/kvquant/simquant_module_quantizer.py of SqueezeAILab/KVQuant). Here the vector is the group that shares a scale,
and the quantiles leave a sixteenth of it at either end. Pages have one size, so their outliers have one number: of the
elements of a page those that lie farthest outside, in the units of the elements, the first of equals. A group may have
none, another several: the largest ranges lose most.

Of SmolLM2's keys (2 bits, 64 tokens a group) 1 % chosen so take 11 % off the relative error; distances from the median
in units of the group's standard or median absolute deviation take 8 or 7 % (``benchmarks/LOG.md``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvloom.codecs._base import wide
from kvloom.codecs._groups import group, ungroup
from kvloom.codecs._half import half_near
from kvloom.codecs._range import check_range
from kvloom.pages import Format

_OUTSIDE = 16
"""Of so many elements of a group one lies outside, at either end."""


@dataclass(frozen=True)
class Outliers:
    """Elements of pages that are not left to codes.

    Attributes:
        index: int64 ``[..., count]``, rising: ``token * head_dim + channel`` within the page.
        values: fp16 ``[..., count]``.
    """

    index: torch.Tensor
    values: torch.Tensor


def split(x: torch.Tensor, fmt: Format, count: int) -> tuple[torch.Tensor, Outliers]:
    """Pages without their outliers, and the outliers.

    Args:
        x: ``[..., page_tokens, head_dim]``, any floating dtype.
        fmt: Format, whose groups are the vectors.
        count: Outliers of each page.

    Returns:
        fp32 (fp64 for fp64) ``[..., page_tokens, head_dim]`` with the median of its group in the place of each outlier;
        and the outliers.

    Raises:
        CacheError: An element is NaN, infinite, or beyond fp16's range.
    """
    elements = wide(x)
    check_range(elements.amin(-1), elements.amax(-1))
    groups = group(elements, fmt)
    ordered = groups.sort(dim=-1).values
    outside = max(1, fmt.group_size // _OUTSIDE)
    below, above = ordered[..., [outside]] - groups, groups - ordered[..., [-1 - outside]]
    distance = ungroup(torch.maximum(below, above), x.shape, fmt).flatten(-2)
    index = distance.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
    median = ungroup(ordered[..., [(fmt.group_size - 1) // 2]].expand_as(groups), x.shape, fmt).flatten(-2)
    flat = elements.flatten(-2)
    dense = flat.scatter(-1, index, median.gather(-1, index)).view(x.shape)
    return dense, Outliers(index, half_near(flat.gather(-1, index)))


def joined(values: torch.Tensor, outliers: Outliers) -> torch.Tensor:
    """Decoded pages ``[..., page_tokens, head_dim]`` with the outliers in their places."""
    flat = values.flatten(-2).scatter(-1, outliers.index, outliers.values.to(values.dtype))
    return flat.view(values.shape)
