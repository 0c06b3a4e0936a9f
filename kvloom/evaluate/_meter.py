"""A meter: plan in, measured divergence out, for searches that measure many plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kvloom.evaluate._contestants import plan_contestant
from kvloom.evaluate._context import Progress, silent, tokens_hash
from kvloom.evaluate._fidelity import Protocol, dense_logits, fidelity

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvloom.plan import Plan

_KEPT_BYTES = 4 * 2**30
"""Room for logits on the host: eight windows of 2,048 tokens and 49,152 words take 3 GiB."""


class KldMeter:
    """Measures plans' mean KL divergence from the uncompressed cache, through the packed cache.

    Every token reads what decoding token by token would have shown it (`prefill="quantized"`), whatever the plan says.

    Args:
        model: a causal language model in evaluation mode.
        windows: int64 token ids `[windows, tokens]`.
        protocol: see `fidelity`.
        batch: windows in one forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, *, protocol: Protocol | None = None, batch: int = 1
    ) -> None:
        self._model = model
        self._windows = windows
        self._protocol = protocol or Protocol()
        self._batch = batch
        self._reference = KeptLogits(partial(dense_logits, model, protocol=self._protocol), _KEPT_BYTES)

    def __call__(self, plan: Plan, progress: Progress = silent) -> dict[str, float]:
        """Measure a plan.

        Args:
            plan: of the model.
            progress: told before every piece of work.

        Returns:
            `value`, `low` and `high` of its 95 % interval, nats per scored token.

        Raises:
            DataError: see `fidelity`.
            ModelError: the plan is for another model, or the model is in training mode.
        """
        contestant = plan_contestant(plan, self._model, name="plan", method="exact", prefill="quantized")
        (record,) = fidelity(
            self._model,
            self._windows,
            [contestant],
            protocol=self._protocol,
            batch=self._batch,
            reference=self._reference,
            progress=progress,
        )
        kld: dict[str, float] = record["kld"]
        return kld


class KeptLogits:
    """Logits of windows, on the host after their first use; those that find no room are computed again each time.

    Args:
        compute: windows `[batch, tokens]` -> logits `[batch, tokens, vocabulary]`.
        room: bytes for them.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], room: int) -> None:
        self._compute = compute
        self._room = room
        self._kept: dict[str, Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits of windows, on their device."""
        key = tokens_hash(rows)
        if key in self._kept:
            return self._kept[key].to(rows.device)
        logits = self._compute(rows)
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._kept[key] = logits.cpu()
        return logits
