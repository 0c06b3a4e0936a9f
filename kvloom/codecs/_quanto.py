"""optimum-quanto's quantiser: the grid that transformers' ``QuantizedCache`` uses with ``backend="quanto"``.

Scale and shift are those of `optimum.quanto.MaxOptimizer` (optimum-quanto 0.2.7, tensor/optimizers/max_optimizer.py),
``scale = (max - min) / levels``, ``shift = -min``, at 2 or 4 bits; an element decodes as ``scale * code - shift``, so
``zero = -shift``. Like all that kvloom stores, both are rounded to fp16, to nearest (quanto keeps the model's dtype),
and codes are then the nearest on the rounded grid; quanto's own codes are the nearest on its own. The ends of a group
may therefore lie outside the grid, by the roundings.

Groups: quanto's ``axis=0`` takes runs of ``group_size`` elements of the last dimension, which are ``per_token`` groups.
Its ``axis=-1`` takes runs of rows of one column: ``per_channel`` groups, except that quanto's run on from head to head
and from sequence to sequence, and are refused where batch x heads x tokens is no multiple of the group size; kvloom's
never leave a page of one head. The cache of transformers differs from this codec in one more way: it quantises again
all that it holds whenever its residual is full.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from kvloom._extras import require
from kvloom.codecs._affine_form import AffineForm, Grid
from kvloom.codecs._base import register
from kvloom.codecs._half import half_near
from kvloom.pages import Format, codec_facts


class Quanto(AffineForm):
    """optimum-quanto's min/max grid, rounded to nearest."""

    name = "quanto"
    facts = codec_facts(name)

    def prepare(self) -> None:
        """See `Codec.prepare`."""
        _library()

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """See `AffineForm.fit`."""
        quanto = _library()
        rows = values.reshape(-1, fmt.group_size)
        # Not by calling the optimizer, which takes a tensor of one group for one without groups.
        scale, shift = quanto.MaxOptimizer().optimize(rows, quanto.qtypes[f"qint{fmt.bits}"], axis=0)
        return half_near(scale).view_as(low), half_near(-shift).view_as(low)

    def group_bound(self, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half a step and the roundings of both parameters; see `AffineForm.group_bound`."""
        extreme = torch.maximum(low.abs(), high.abs())
        rounding = (extreme + 2 * (high - low)) * 2**-11 + 1e-7 * (1 + fmt.levels)
        return 0.5 * (high - low) / fmt.levels + rounding


@cache
def _library() -> ModuleType:
    return require("quanto", "The quanto codec")


QUANTO = register(Quanto())
