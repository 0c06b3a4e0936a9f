"""kvloom's own plan file, so that conversion has two ends."""

from __future__ import annotations

from typing import Any

from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._validate import validated
from kvloom.plan.formats._base import PlanFormat, register
from kvloom.plan.formats._deviations import Deviations


class Kvloom(PlanFormat):
    """``kv_plan.json``."""

    name = "kvloom"
    writes = True

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`.

        Raises:
            PlanError: A field is wrong.
            ModelError: The plan is for another model.
        """
        plan = validated(Plan, document, self.name)
        plan.model.check(model)
        return plan

    def write(self, plan: Plan, deviations: Deviations) -> str:
        """See `PlanFormat.write`.

        Raises:
            PlanError: The plan has calibrated tensors, which text cannot hold.
        """
        if plan.tensors:
            raise PlanError(
                f"tensors lie in a file of their own, {plan.tensors.file}: use Plan.save, or copy both files."
            )
        return plan.to_json()


KVLOOM = register(Kvloom())
