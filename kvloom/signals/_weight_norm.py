"""KVQ's signal: the norm of the weights that make the keys and the values.

Source: KVQ (arXiv 2502.15075; the bit rule of its package spectral-kv): a tensor of norm `s` stored in `b` bits loses
`s^2 4^-b`. The norm is the Frobenius or the spectral one of the key (or value) projection's weight. Neither prompts nor
formats are looked at: of a format only its bits count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvloom.errors import ModelError
from kvloom.signals._base import SIDES, ModelSignal, Scores, Side
from kvloom.signals._measure import Meter
from kvloom.signals._pieces import Pieces
from kvloom.signals._prompts import Prompts


class WeightNorm(ModelSignal):
    """Squared norm of the projection times `4^-bits`.

    Args:
        name: Name of the signal.
        squared: The squared norm of a matrix.
    """

    def __init__(self, name: str, squared: Callable[[Tensor], Tensor]) -> None:
        self.name = name  # type: ignore[misc]  # one class, a signal for each norm
        self._squared = squared

    def steps(self, meter: Meter) -> int:
        """One."""
        return 1

    def measure(self, meter: Meter, prompts: Prompts, pieces: Pieces, step: Callable[[], None]) -> Scores:
        """See `ModelSignal.measure`; without unit."""
        found = pieces.get({"weights": True}, lambda: self._losses(meter))
        step()
        return {side: found[side].expand(len(prompts), -1, -1, -1) for side in SIDES}

    def _losses(self, meter: Meter) -> dict[str, Tensor]:
        """`[1, layers, 1, formats]` of each side."""
        found: dict[str, Tensor] = {}
        for side in SIDES:
            norms = torch.stack([self._squared(_weight(meter, layer, side)).cpu() for layer in meter.layers])
            found[side] = (norms[:, None] * bits_loss(meter, side)[None])[None, :, None]
        return found


def bits_loss(meter: Meter, side: Side) -> Tensor:
    """`4^-bits` of each format, float32 `[formats]`."""
    return torch.tensor([4.0**-fmt.bits for fmt in meter.formats[side]])


def frobenius(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm of `[..., rows, columns]`, float32 `[...]`."""
    return matrix.float().square().sum(dim=(-2, -1))


def spectral(matrix: Tensor) -> Tensor:
    """Squared largest singular value of `[..., rows, columns]`, float32 `[...]`."""
    wide = matrix.float()
    small = wide @ wide.mT if wide.shape[-2] < wide.shape[-1] else wide.mT @ wide
    largest: Tensor = torch.linalg.eigvalsh(small)[..., -1]
    return largest


def _weight(meter: Meter, layer: int, side: Side) -> Tensor:
    module, columns = meter.projections[layer].of(side)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise ModelError(
            f"the {side} projection of layer {layer} ({type(module).__name__}) has no weight matrix, so its norm is "
            "unknown; choose another signal."
        )
    return weight.detach()[columns]
