"""Second order: squared storage errors, weighted with the diagonal of the empirical Fisher information.

Source: KVQuant (arXiv 2401.18079, section 3.3), which weights its codebooks so: `sum_i F_i (x_hat_i - x_i)^2` with
`F_i = g_i^2`, `g` the gradient of the summed cross entropy of the true next tokens. Half of it, per scored token, would
be the KL divergence if errors were independent and the model's own next tokens were the text's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._first_order import products


class Fisher(LayerSignal):
    """Half the sum of squared products of errors and gradients."""

    name = "fisher"
    labels = "true"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, kv_heads, formats]`, nats per scored token."""
        sums = [part.square().sum(dim=(2, 3)) for part in products(evidence)]
        return torch.stack(sums, dim=2) / (2.0 * evidence.scored[:, None, None])
