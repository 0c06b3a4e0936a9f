"""KVmix's signal: the norm of the loss's gradient by the weights that make the keys and the values.

Source: KVmix (arXiv 2506.08018), equations 2 to 11: the 2-norm of `dL / dW_k` and of `dL / dW_v` of each layer, `L` the
mean cross entropy of the true next tokens, mean over prompts. One backward pass serves all layers: the gradient by a
projection's weight is the product of the gradient by its output and its input.

KVmix ranks layers by the norm and never sees a format. Here a format's predicted loss is the norm times the relative
error of what it stores, `||x_hat - x|| / ||x||` (2-norms over a layer's packed keys, or values).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.signals._base import Evidence, LayerSignal
from kvloom.signals._stored import state_error


class WeightGradient(LayerSignal):
    """One column: the 2-norm of the gradient of the mean loss by the projection's weight; no prediction."""

    name = "weight_gradient"
    labels = "true"

    def score(self, evidence: Evidence) -> Tensor:
        """Norms `[batch, 1, 1]` in nats per unit of weight."""
        if evidence.inputs is None or evidence.output_gradient is None:
            raise RuntimeError("the projection has seen no backward pass")
        outputs, inputs = evidence.output_gradient.float(), evidence.inputs.float()
        weight_gradient = torch.einsum("bto,bti->boi", outputs, inputs)
        norms: Tensor = torch.linalg.vector_norm(weight_gradient, dim=(1, 2)) / evidence.scored
        return norms[:, None, None]


class GradientNorm(LayerSignal):
    """The norm times the relative error of what is stored."""

    name = "gradient_norm"
    labels = "true"

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`; `[batch, 1, formats]`."""
        return WEIGHT_GRADIENT.score(evidence) * relative_errors(evidence)


def relative_errors(evidence: Evidence) -> Tensor:
    """`||x_hat - x|| / ||x||` of each format over a layer's packed keys or values, `[batch, 1, formats]`; zeros: 0."""
    whole = _norm(evidence.states[:, :, evidence.packed].float()).clamp_min(torch.finfo(torch.float32).tiny)
    formats = [state_error(evidence.states, evidence.packed, fmt, evidence.rope) for fmt in evidence.formats]
    return (torch.stack([_norm(error) for error in formats], dim=1) / whole[:, None])[:, None]


def _norm(states: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(states, dim=(1, 2, 3))
    return norms


WEIGHT_GRADIENT = WeightGradient()
"""Not registered, as it predicts nothing: every profile with a backward pass records it, for KVmix's own rule."""
