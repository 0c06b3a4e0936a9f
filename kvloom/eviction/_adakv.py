"""Ada-KV (Feng et al., arXiv 2407.11550): SnapKV's scores, and the KV heads of a layer compete for its budget.

A head whose attention is spread widely needs more tokens than one that looks at few. Every head keeps the share
``safeguard`` of its budget, at least; the rest of the layer's goes to the highest scores of all heads. Here it goes in
whole pages, the page a head would fill next with the largest sum of scores first: the largest kept attention that
whole pages allow, and heads then differ in pages alone. Heads whose formats differ do not compete, since their pages
are not of one size.
"""

from __future__ import annotations

from pydantic import Field

from kvloom.eviction._base import register
from kvloom.eviction._snapkv import SnapKV


class AdaKV(SnapKV):
    """SnapKV with one budget for all KV heads of a layer.

    Attributes:
        alpha: Share of its budget that every head keeps; 0.2 in the paper.
    """

    name = "adakv"
    is_pooled = True
    alpha: float = Field(default=0.2, ge=0.0, le=1.0)

    @property
    def safeguard(self) -> float:
        """See `Policy.safeguard`."""
        return self.alpha


register(AdaKV)
