"""A meter: plan in, measured divergence out, for searches that measure many plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvloom.evaluate._contestants import plan_contestant
from kvloom.evaluate._context import Progress, silent
from kvloom.evaluate._fidelity import Protocol, fidelity

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvloom.plan import Plan


def kld_meter(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    protocol: Protocol | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Callable[[Plan], dict[str, float]]:
    """A function that measures a plan's mean KL divergence from the uncompressed cache, through the packed cache.

    Every token reads what decoding token by token would have shown it (`prefill="quantized"`), whatever the plan says.

    Args:
        model: a causal language model in evaluation mode.
        windows: int64 token ids `[windows, tokens]`.
        protocol: see `fidelity`, as for what it raises.
        batch: windows in one forward pass.
        progress: told before every piece of work.

    Returns:
        Plan -> `value`, `low` and `high` of its 95 % interval, nats per scored token.
    """

    def measure(plan: Plan) -> dict[str, float]:
        contestant = plan_contestant(plan, model, name="plan", method="exact", prefill="quantized")
        (record,) = fidelity(model, windows, [contestant], protocol=protocol, batch=batch, progress=progress)
        kld: dict[str, float] = record["kld"]
        return kld

    return measure
