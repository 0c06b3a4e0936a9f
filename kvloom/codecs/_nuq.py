"""KVQuant's non-uniform grids, calibrated for keys and values of each layer: ``x_hat = scale * point[code] + zero``.

Source: KVQuant (Hooper et al., arXiv 2401.18079, section 3.3; SqueezeAILab/KVQuant, function `quant_fn_nuq_recon`).
Every group is brought to [-1, 1] by the middle and half the width of its range, ``zero = (max + min) / 2`` and
``scale = (max - min) / 2``, and coded with the nearest of ``2**bits`` points in [-1, 1], which
`kvloom.calibrate` finds. Like all that kvloom stores, both are rounded to fp16: ``zero`` to nearest,
``scale`` up, so that no element leaves [-1, 1].

The paper groups keys per channel, before positions are applied, and values per token. Here keys are those of the cache,
which know their positions. The paper's range is without outliers, which it stores apart; here it is the whole range.
"""

from __future__ import annotations

import torch

from kvloom.codecs._affine_form import Grid
from kvloom.codecs._base import register, wide
from kvloom.codecs._codebook_form import CodebookForm, normalised
from kvloom.codecs._groups import group
from kvloom.codecs._half import half_near, half_up
from kvloom.pages import Format, codec_facts


class Nuq(CodebookForm):
    """Calibrated points between the extremes of each group."""

    name = "nuq"
    facts = codec_facts(name)

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """See `CodebookForm.fit`."""
        return _range(low, high)

    def normalise(self, x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
        """What the points are calibrated on.

        Args:
            x: ``[..., tokens, head_dim]``, whole groups, finite and within fp16's range.
            fmt: Format; its codebook does not matter.

        Returns:
            The elements by group in units of the group's scale, ``[..., a, b, group_size]`` in [-1, 1]; and the scales
            ``[..., a, b, 1]``; fp32, or fp64 for fp64.
        """
        values = group(wide(x), fmt)
        scale, zero = _range(values.amin(-1), values.amax(-1))
        return normalised(values, scale, zero), scale.to(values.dtype)[..., None]


def _range(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    zero = half_near(low / 2 + high / 2)
    middle = zero.to(low.dtype)
    return half_up(torch.maximum(high - middle, middle - low)), zero


NUQ = Nuq()
register(NUQ)
