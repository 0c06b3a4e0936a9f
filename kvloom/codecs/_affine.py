"""Min/max quantisation, the format of KIVI, KVmix and KVTuner: a uniform grid between the extremes of each group.

Asymmetric: ``zero = min`` rounded down to fp16, ``scale = (max - zero) / levels`` rounded up to fp16, so the grid
always covers the group and ``|x - x_hat| <= scale / 2``. Symmetric: levels at odd multiples of ``scale / 2``, ``scale =
2 max|x| / levels`` rounded up; no code is wasted and one bit works. Codes are computed with the rounded parameters that
decoding will use (KIVI, arXiv 2402.02750, eq. 1 rounds afterwards and decodes on another grid than it encoded on).

A constant group has scale 0 (or the one fp16 step its value is off the fp16 grid) and decodes to its value.
"""

from __future__ import annotations

import torch

from kvloom.codecs._affine_form import AffineForm, Grid
from kvloom.codecs._base import register
from kvloom.codecs._half import half_down, half_up
from kvloom.pages import Format, codec_facts


class Affine(AffineForm):
    """Uniform grid between the extremes of each group."""

    name = "affine"
    facts = codec_facts(name)

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """See `AffineForm.fit`."""
        return covering(low, high, fmt)

    def group_bound(self, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half a step, where a step fits in fp16; see `AffineForm.group_bound`."""
        return covering_bound(low, high, fmt)


def covering(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
    """The grid from ``low`` to ``high``, or to the larger of their magnitudes on both sides of zero."""
    return _symmetric(low, high, fmt) if fmt.symmetric else _asymmetric(low, high, fmt)


def covering_bound(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Largest error on that grid: half a step, the step's own rounding and fp32's included."""
    extreme = torch.maximum(low.abs(), high.abs())
    spread = 2 * extreme if fmt.symmetric else high - low
    rounding = (extreme * 2**-10 + 1e-7) / fmt.levels + 6e-8
    return 0.5 * (spread / fmt.levels * (1 + 2**-10) + rounding) + 4e-7 * extreme


def _asymmetric(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
    zero = half_down(low + 0.0)  # +0 always: the sign of a minimum of both zeros depends on who finds it
    # By a tensor: CUDA divides by a number inexactly, and codes must be the same on every device.
    return half_up((high - zero.to(high.dtype)) / high.new_full((1,), fmt.levels)), zero


def _symmetric(low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
    return half_up(torch.maximum(low.abs(), high.abs()) * (2.0 / fmt.levels)), None


AFFINE = register(Affine())
