"""PyramidKV (Cai et al., arXiv 2406.02069): SnapKV's scores, more tokens in low layers than in high ones.

Attention is spread widely in low layers and narrows with depth. Budgets fall linearly: of ``x`` tokens a layer, beyond
those that every layer keeps, the last layer has ``x / beta`` and the first ``2 x - x / beta``, or the whole prompt, if
that is less, in which case the last layer has what is left. Whole tokens are the steps of the running sum rounded down,
so that the budgets of all layers add up to ``layers * budget`` exactly (the published code rounds the step, and they do
not).
"""

from __future__ import annotations

from fractions import Fraction
from math import floor

from pydantic import Field

from kvloom.eviction._base import register
from kvloom.eviction._snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV with a budget that falls from layer to layer.

    Attributes:
        window: See `SnapKV`; 8 in the paper.
        beta: Of ``x`` tokens on average the last layer keeps ``x / beta``.
    """

    name = "pyramidkv"
    window: int = Field(default=8, ge=1)
    beta: int = Field(default=20, ge=1)

    def layer_budget(self, budget: int, layer: int, layers: int, tokens: int, reserved: int) -> int:
        """See `Policy.layer_budget`."""
        mean = budget - reserved
        if layers == 1 or tokens <= budget:
            return budget
        first = min(Fraction(2 * mean) - Fraction(mean, self.beta), Fraction(tokens - reserved))
        fall = 2 * (first - mean) / (layers - 1)

        def sum_of(count: int) -> int:
            """Tokens of the first ``count`` layers."""
            return floor(count * first - fall * count * (count - 1) / 2)

        return reserved + sum_of(layer + 1) - sum_of(layer)


register(PyramidKV)
