"""The codebook family: ``x_hat = scale * point[code] + zero`` from one page record, whatever chose scale and zero.

A member decides the parameters of each group; codes are then those of the nearest points (`kvloom.pages.Format.points`)
of the scaled grid, with the parameters rounded to fp16 as they are stored. Every kernel that reads pages reads every
member's; the CUDA kernels pack those they know (`kvloom/kernels/_cuda_pages.py`), torch all.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from kvloom.codecs._affine_form import Grid
from kvloom.codecs._base import Codec, Encoded, wide
from kvloom.codecs._groups import group, ungroup
from kvloom.codecs._range import check_range
from kvloom.pages import Format, codebook_points


class CodebookForm(Codec):
    """A codec whose records decode as ``scale * point[code] + zero``."""

    @abstractmethod
    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """Parameters of each group, from its own elements alone.

        Args:
            values: fp32 or fp64 ``[..., a, b, group_size]``, finite and contiguous.
            low: Smallest element of each group, ``[..., a, b]``.
            high: Largest, likewise.
            fmt: Format.

        Returns:
            fp16 ``[..., a, b]`` each.
        """

    def points(self, fmt: Format, like: torch.Tensor) -> torch.Tensor:
        """What codes stand for, ``[2**bits]``, in the dtype and on the device of ``like``.

        Raises:
            PlanError: The format lacks its codebook.
        """
        return codebook_points(self.facts.points(self.name, fmt.bits, fmt.codebook), like.device).to(like.dtype)

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """See `Codec.encode`.

        Raises:
            CacheError: An element is NaN, infinite, or beyond fp16's range, in which scales are stored.
            PlanError: The codec does not take this format, or the format lacks its codebook.
        """
        self.facts.check(self.name, fmt.bits, fmt.symmetric)
        values = group(wide(x), fmt).contiguous()  # one order of summation for all
        low, high = values.amin(-1), values.amax(-1)
        check_range(low, high)
        scale, zero = self.fit(values, low, high, fmt)
        codes = nearest_points(normalised(values, scale, zero), self.points(fmt, values)).to(torch.uint8)
        return Encoded(ungroup(codes, x.shape, fmt), (scale,) if zero is None else (scale, zero))

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """See `Codec.decode`."""
        points = self.points(fmt, encoded.params[0].float())
        values = points[group(encoded.codes, fmt).int()] * encoded.params[0].float()[..., None]
        if not fmt.symmetric:
            values += encoded.params[1].float()[..., None]
        return ungroup(values, encoded.codes.shape, fmt)

    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half the widest gap of the scaled grid, or how far the element lies beyond its ends; see `Codec.bound`."""
        values = group(wide(x), fmt).contiguous()
        scale, zero = self.fit(values, values.amin(-1), values.amax(-1), fmt)
        points = self.points(fmt, values)
        step = scale.to(values.dtype)[..., None]
        away = values if zero is None else values - zero.to(values.dtype)[..., None]
        beyond = torch.maximum(step * points[0] - away, away - step * points[-1])
        largest = torch.maximum(step * points.diff().amax() / 2, beyond)
        return ungroup(largest + 4e-7 * (values.abs() + away.abs() + step * points.abs().amax()), x.shape, fmt).float()


def normalised(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Elements ``[..., group_size]`` less their group's zero point, in units of its scale (of 1 where that is 0)."""
    step = torch.where(scale > 0, scale, 1.0).to(values.dtype)[..., None]
    away = values if zero is None else values - zero.to(values.dtype)[..., None]
    return away / step


def nearest_points(normalised: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Codes of the points nearest to numbers in units of the scale, int32."""
    return torch.bucketize(normalised, (points[1:] + points[:-1]) / 2, out_int32=True)
