"""The affine family: ``x_hat = scale * code + zero`` from one page record, whatever chose scale and zero.

A member decides the parameters of each group; codes are then the nearest points of the grid that decoding will use,
with the parameters rounded to fp16 as they are stored. Every kernel that reads pages reads every member's; the CUDA
kernels pack those they know, torch all. The bytes of min/max are the same on every device. Others may choose another
grid on another device where two are equally good but for rounding.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from kvloom.codecs._base import Codec, Encoded, wide
from kvloom.codecs._groups import group, ungroup
from kvloom.codecs._range import check_range
from kvloom.pages import Format

Grid = tuple[torch.Tensor, torch.Tensor | None]
"""Scale and zero point, None where the format is symmetric; fp16, one of each a group."""


class AffineForm(Codec):
    """A codec whose records decode as ``scale * code + zero``."""

    @abstractmethod
    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """Parameters of each group, from its own elements alone.

        Args:
            values: fp32 or fp64 ``[..., a, b, group_size]``, finite.
            low: Smallest element of each group, ``[..., a, b]``.
            high: Largest, likewise.
            fmt: Format.

        Returns:
            fp16 ``[..., a, b]`` each.
        """

    @abstractmethod
    def group_bound(self, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Largest error of an element of a group with these extremes (see `Codec.bound`), ``[..., a, b]``."""

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """See `Codec.encode`.

        Raises:
            CacheError: An element is NaN, infinite, or beyond fp16's range, in which scales are stored.
            PlanError: The codec does not take this format.
        """
        self.facts.check(self.name, fmt.bits, fmt.symmetric)
        values = group(wide(x), fmt)
        low, high = values.amin(-1), values.amax(-1)
        check_range(low, high)
        scale, zero = self.fit(values, low, high, fmt)
        codes = nearest_codes(values, scale, zero, fmt).to(torch.uint8)
        params = (scale,) if zero is None else (scale, zero)
        return Encoded(ungroup(codes, x.shape, fmt), params)

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """See `Codec.decode`."""
        scale = encoded.params[0]
        zero = None if fmt.symmetric else encoded.params[1]
        grouped = group(encoded.codes.float(), fmt)
        values = grouped * scale.float()[..., None] + grid_start(scale, zero, fmt)[..., None]
        return ungroup(values, encoded.codes.shape, fmt)

    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        """See `Codec.bound`."""
        values = group(wide(x), fmt)
        largest = self.group_bound(values.amin(-1), values.amax(-1), fmt)
        return ungroup(largest[..., None].expand(values.shape), x.shape, fmt).float()


def grid_start(scale: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """What code 0 stands for, fp32."""
    return scale.float() * (-0.5 * fmt.levels) if zero is None else zero.float()


def nearest_codes(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """Codes of the grid points nearest to ``values [..., group_size]``, as numbers of its dtype."""
    step = scale.to(values.dtype)[..., None]
    start = grid_start(scale, zero, fmt).to(values.dtype)[..., None]
    return torch.where(step > 0, (values - start) / step, 0.0).round_().clamp_(0, fmt.levels)
