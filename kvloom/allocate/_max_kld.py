"""The smallest exact plan that a measurement accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kvloom.allocate._front import ExactFront
from kvloom.errors import PlanError
from kvloom.plan import Plan

_CLOSE = 1.01
"""The plan found is at most this many times as large as one that was refused, unless no exact plan lies between."""

Interval = Mapping[str, float]
"""A figure with its 95 % interval: `value`, `low` and `high`."""


def smallest_plan(
    front: ExactFront, limit: float, measure: Callable[[Plan], Interval], measured_on: str | None = None
) -> Plan:
    """Bisects the front for the smallest plan whose measured divergence is within a limit.

    A plan is accepted if the upper end of its 95 % interval is at most `limit`. The largest plan is measured first,
    then plans of sizes half-way, in ratio, between the largest size refused and the smallest one accepted: this takes
    for granted that divergence falls along the front.

    Args:
        front: the exact plans.
        limit: nats per scored token.
        measure: a plan's mean KL divergence on text that the profile has not seen, with its interval.
        measured_on: which text that is, in words.

    Returns:
        The plan; its certificate has `max_kld` (the limit), `measured_kld` (its own), `measured_on` and `tried`: bytes
        and divergence of every plan measured, in order.

    Raises:
        PlanError: `limit` is not above 0, or not even the largest plan is accepted.
    """
    if not 0 < limit < math.inf:
        raise PlanError(f"max_kld is {limit}: give a finite number above 0")
    best, kld = front.largest, measure(front.largest)
    tried = [(front.nbytes(best), kld)]
    if kld["high"] > limit:
        raise PlanError(
            f"max_kld {limit:g} is out of reach, since the plan of least predicted loss has {kld['value']:.3g} "
            f"[{kld['low']:.3g}, {kld['high']:.3g}]: raise it, or profile with more bits"
        )
    refused = front.least - 1
    while front.nbytes(best) > refused * _CLOSE:
        middle = max(round(math.sqrt(max(refused, 1) * front.nbytes(best))), front.least)
        plan = front.plan(middle)
        if (nbytes := front.nbytes(plan)) <= refused:
            refused = middle  # no exact plan lies between
            continue
        kld = measure(plan)
        tried.append((nbytes, kld))
        if kld["high"] <= limit:
            best = plan
        else:
            refused = middle
    proof = {
        "max_kld": limit,
        "measured_kld": dict(dict(tried)[front.nbytes(best)]),
        "measured_on": measured_on,
        "tried": [{"nbytes": nbytes, "kld": dict(kld)} for nbytes, kld in tried],
    }
    return _with_proof(best, proof)


def _with_proof(plan: Plan, proof: dict[str, Any]) -> Plan:
    """The plan with more in its certificate."""
    assert plan.provenance
    certificate = {**(plan.provenance.certificate or {}), **proof}
    return plan.model_copy(update={"provenance": plan.provenance.model_copy(update={"certificate": certificate})})
