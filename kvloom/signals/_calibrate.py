"""All that a plan needs of calibration, in the order in which one part builds on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kvloom.errors import PlanError
from kvloom.plan import Plan
from kvloom.signals._codebooks import calibrate_codebooks
from kvloom.signals._compute import Progress
from kvloom.signals._rotations import calibrate_rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibrate(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    *,
    rotate: bool = False,
    texts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Plan:
    """The plan with codebooks wherever its codec is ``nuq``, and with calibrated rotations if they are asked for.

    Rotations come first: codebooks are those of the elements that they make. What the plan has already is replaced.

    Args:
        model: The plan's model; its attention goes through transformers' attention interface.
        plan: What to calibrate.
        tokens: Calibration prompts, integers ``[prompts, tokens]``. Take them from other texts than those the plan is
            evaluated on; for rotations about as long as the contexts to come.
        rotate: Calibrate rotations; without it, those of a plan that has some stay as they are.
        texts: Names of the texts the prompts come from, for the record.
        progress: Called after each prompt.

    Raises:
        DataError: See `calibrate_codebooks` and `calibrate_rotations`.
        ModelError: Likewise.
        PlanError: Likewise; or there is nothing to calibrate.
    """
    if not (rotate or plan.needs_codebooks):
        raise PlanError(
            "the plan has nothing to calibrate: give the keys or the values of some layer codec 'nuq', or ask for "
            "rotations with rotate=True (kvloom calibrate --rotate)."
        )
    if rotate:
        plan = calibrate_rotations(model, plan, tokens, texts=texts, progress=progress)
    if plan.needs_codebooks:
        plan = calibrate_codebooks(model, plan, tokens, texts=texts, progress=progress)
    return plan
