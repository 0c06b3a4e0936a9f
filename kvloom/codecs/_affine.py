"""Affine (uniform) quantisation: ``x_hat = scale * code + zero``, the format of KIVI, KVmix and KVTuner.

Asymmetric: ``zero = min`` rounded down to fp16, ``scale = (max - zero) / levels`` rounded up to fp16, so the grid
always covers the group and ``|x - x_hat| <= scale / 2``. Symmetric: levels at odd multiples of ``scale / 2``, ``scale =
2 max|x| / levels`` rounded up; no code is wasted and one bit works. Codes are computed with the rounded parameters that
decoding will use (KIVI, arXiv 2402.02750, eq. 1 rounds afterwards and decodes on another grid than it encoded on).

A constant group has scale 0 (or the one fp16 step its value is off the fp16 grid) and decodes to its value.
"""

from __future__ import annotations

import torch

from kvloom.codecs._base import Codec, Encoded, register, wide
from kvloom.errors import CacheError
from kvloom.pages import Format

_FP16_MAX = torch.finfo(torch.float16).max


class Affine(Codec):
    """Uniform grid between the extremes of each group."""

    name = "affine"

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """See `Codec.encode`.

        Raises:
            CacheError: An element is NaN, infinite, or beyond fp16's range, in which scales are stored.
        """
        grouped = group(wide(x), fmt)  # [..., a, b, group_size]
        low, high = grouped.amin(-1), grouped.amax(-1)
        _check_range(low, high)
        scale, zero = _symmetric(low, high, fmt) if fmt.symmetric else _asymmetric(low, high, fmt)
        codes = _codes(grouped, scale, _zero(scale, zero, fmt), fmt)
        params = (scale,) if zero is None else (scale, zero)
        return Encoded(ungroup(codes, x.shape, fmt), params)

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """See `Codec.decode`."""
        scale = encoded.params[0]
        zero = None if fmt.symmetric else encoded.params[1]
        grouped = group(encoded.codes.float(), fmt)
        values = grouped * scale.float()[..., None] + _zero(scale, zero, fmt)[..., None]
        return ungroup(values, encoded.codes.shape, fmt)


OUT_OF_RANGE = (
    "keys or values to be packed hold NaN, infinity or a magnitude above 65504, which fp16 scales cannot express: find "
    "the layer that overflows, or keep it exact with bits=16."
)


def group(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Groups along the last axis: ``[..., tokens, head_dim]`` -> ``[..., a, b, group_size]``.

    ``per_channel``: a = token group, b = channel. ``per_token``: a = token, b = channel group.
    """
    *lead, tokens, channels = x.shape
    if fmt.grouping == "per_channel":
        return x.reshape(*lead, tokens // fmt.group_size, fmt.group_size, channels).transpose(-1, -2)
    return x.reshape(*lead, tokens, channels // fmt.group_size, fmt.group_size)


def ungroup(x: torch.Tensor, shape: torch.Size, fmt: Format) -> torch.Tensor:
    """Inverse of `group`."""
    if fmt.grouping == "per_channel":
        x = x.transpose(-1, -2)
    return x.reshape(shape)


def _check_range(low: torch.Tensor, high: torch.Tensor) -> None:
    bound = torch.maximum(low.abs(), high.abs()).amax() if low.numel() else low.new_zeros(())
    if not bool(bound <= _FP16_MAX):
        raise CacheError(OUT_OF_RANGE)


def _asymmetric(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    zero = _fp16_down(low + 0.0)  # +0 always: the sign of a minimum of both zeros depends on who finds it
    # By a tensor: CUDA divides by a number inexactly, and codes must be the same on every device.
    return _fp16_up((high - zero.to(high.dtype)) / high.new_full((1,), fmt.levels)), zero


def _symmetric(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, None]:
    return _fp16_up(torch.maximum(low.abs(), high.abs()) * (2.0 / fmt.levels)), None


def _zero(scale: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    return scale.float() * (-0.5 * fmt.levels) if zero is None else zero.float()


def _codes(grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, fmt: Format) -> torch.Tensor:
    step = scale.to(grouped.dtype)[..., None]
    ratio = torch.where(step > 0, (grouped - zero.to(grouped.dtype)[..., None]) / step, 0.0)
    return ratio.round_().clamp_(0, fmt.levels).to(torch.uint8)


def _fp16_down(x: torch.Tensor) -> torch.Tensor:
    """Largest fp16 number not above ``x`` (|x| <= 65504)."""
    near = x.half()
    return torch.where(near.to(x.dtype) > x, torch.nextafter(near, near.new_full((), -_FP16_MAX)), near)


def _fp16_up(x: torch.Tensor) -> torch.Tensor:
    """Smallest fp16 number not below ``x``, at most 65504."""
    near = x.clamp(max=_FP16_MAX).half()
    return torch.where(near.to(x.dtype) < x, torch.nextafter(near, near.new_full((), _FP16_MAX)), near)


AFFINE = register(Affine())
