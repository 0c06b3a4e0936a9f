"""KIVI (arXiv 2402.02750): per-channel keys and per-token values in one group size, newest tokens exact."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import TensorSpec, Window
from kvloom.plan._validate import validated
from kvloom.plan.formats._axes import group_size_of
from kvloom.plan.formats._base import Document, PlanFormat, register
from kvloom.plan.formats._deviations import Deviations

Bits = Literal[2, 4, 8]


class Config(Document):
    """What KIVI reads from a model's config (`models/llama_kivi.py`); defaults are those of its paper (G 32, R 128)."""

    k_bits: Bits
    v_bits: Bits
    group_size: int = Field(default=32, gt=0)
    residual_length: int = Field(default=128, ge=0)


class Kivi(PlanFormat):
    """KIVI's four fields."""

    name = "kivi"

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        config = validated(Config, document, self.name)
        size, recent = config.group_size, config.residual_length
        if recent % size:
            raise PlanError(f"residual_length {recent} is not a multiple of group_size {size}, which KIVI asserts.")
        deviations.note(
            f"residual_length {recent}: KIVI flushes {recent} keys at a time, so 0 to {recent} are exact, and the "
            f"newest {recent} values; the plan keeps at least {recent} of both"
        )
        key = TensorSpec(
            bits=config.k_bits,
            grouping="per_channel",
            group_size=group_size_of(size, "per_channel", model, "group_size"),
        )
        value = TensorSpec(
            bits=config.v_bits,
            grouping="per_token",
            group_size=group_size_of(size, "per_token", model, "group_size"),
        )
        return Plan.from_specs(model, dict.fromkeys(model.packed_layers, (key, value)), window=Window(recent=recent))


KIVI = register(Kivi())
