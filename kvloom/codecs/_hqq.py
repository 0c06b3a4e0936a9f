"""HQQ's quantiser: min/max scales and zero points that minimise a sparse error, half-quadratically.

Half-Quadratic Quantization (Badri and Shaji 2023; library hqq 0.2.8, hqq/core/quantize.py and optimize.py). The first
grid is `Quantizer.quantize`'s; the zero point is then moved by 20 of the library's own proximal steps. The library
stops earlier if the mean absolute error over *all* it was given grows, so that a group's codes depend on its
neighbours; here every group takes all steps, so that a page has the same codes however it arrives. Given hundreds of
groups the library takes as many, and errors are the same (tests/codecs/test_hqq.py). Steps run in fp64 (the library:
fp32 on CPUs, fp16 on GPUs), so that the order of summation does not show in the fp16 result.

HQQ decodes ``(code - z) * s``, with ``z`` in units of codes. The record stores ``scale = s`` and ``zero = -z * s``,
both rounded to fp16, to nearest; codes are then the nearest on the rounded grid. The library rounds ``s`` and ``z`` to
the model's dtype instead, after it has chosen the codes.

Groups: HQQ's ``axis=1`` takes runs of ``group_size`` elements of the last dimension. ``per_token`` groups are that on a
cache of ``[..., tokens, head_dim]``, ``per_channel`` groups are that on its transpose. HQQ's ``axis=0`` has no
counterpart: its groups gather elements that lie ``numel / group_size`` apart, across tokens and heads.

A group whose range is at most 1e-4 has step 1, and no step is below 5e-5 (both the library's): such groups decode to
their mean.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from kvloom._extras import require
from kvloom.codecs._affine_form import AffineForm, Grid
from kvloom.codecs._base import register
from kvloom.codecs._half import half_near
from kvloom.pages import Format, codec_facts

LP_NORM, BETA, ITERATIONS = 0.7, 1e1, 20
"""The library's defaults (``opt_params`` of ``optimize_weights_proximal``)."""

_SMALL_RANGE = 1e-4


class Hqq(AffineForm):
    """HQQ's grid, every group optimised on its own."""

    name = "hqq"
    facts = codec_facts(name)

    def prepare(self) -> None:
        """See `Codec.prepare`."""
        _library("quantize")

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """See `AffineForm.fit`."""
        rows = values.reshape(-1, fmt.group_size)
        first = {"nbits": fmt.bits, "group_size": fmt.group_size, "axis": 1, "optimize": False, "bitpack": False}
        _, meta = _library("quantize").Quantizer.quantize(rows, device=rows.device, **first)
        scale = meta["scale"].double()
        zero = _moved(rows.double(), scale.reciprocal(), meta["zero"].double(), fmt)
        return half_near(scale).view_as(low), half_near(-zero * scale).view_as(low)

    def group_bound(self, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Ten steps and the roundings of both parameters; see `AffineForm.group_bound`.

        A proximal step moves the grid by the mean of something between zero and each element's error. Of a grid moved
        up no element lies above, so it moves on by at most half a step, or back by at most half a step too far.
        """
        extreme = torch.maximum(low.abs(), high.abs())
        moved = ITERATIONS / 2 * ((high - low) / fmt.levels).clamp(min=_SMALL_RANGE)
        return moved + (extreme + moved + 2 * (high - low)) * 2**-11


def _moved(rows: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Zero points in units of codes, after the proximal iterations.

    Args:
        rows: fp64 ``[groups, group_size]``.
        inverse: 1 / step, ``[groups, 1]``.
        zero: First zero points, likewise.
        fmt: Format.
    """
    step = _library("optimize").optimize_weights_proximal_legacy_step
    for _ in range(ITERATIONS):
        _, _, zero, _ = step(rows, inverse, zero, [0, fmt.levels], BETA, LP_NORM, 1)
    return zero


@cache
def _library(module: str) -> ModuleType:
    require("hqq", "The hqq codec")
    return import_module(f"hqq.core.{module}")


HQQ = register(Hqq())
