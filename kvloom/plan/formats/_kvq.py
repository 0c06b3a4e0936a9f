"""KVQ 0.0.x ("More for Keys, Less for Values", arXiv 2502.15075, mohsenhariri/kvq): one format in all layers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import TensorSpec
from kvloom.plan._validate import validated
from kvloom.plan.formats._axes import group_size_of, grouping_of, residual_window, run_settings
from kvloom.plan.formats._base import Document, PlanFormat, register
from kvloom.plan.formats._deviations import Deviations


class Config(Document):
    """`KVQCacheConfig` with its defaults."""

    backend: Literal["quanto"] = "quanto"
    nbits_k: Literal[2, 4] = 4
    nbits_v: Literal[2, 4] = 2
    axis_key: Literal[0, 1, -1] = 0
    axis_value: Literal[0, 1, -1] = 0
    q_group_size: int = Field(default=64, gt=0)
    residual_length: int = Field(default=128, ge=0)
    compute_dtype: Any = None
    device: Any = None


class KVQ(PlanFormat):
    """KVQ's dict or configuration object."""

    name = "kvq"

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        config = validated(Config, document, self.name)
        run_settings(config.model_dump(include={"compute_dtype", "device"}), model, deviations)
        key = _spec(config.nbits_k, config.axis_key, "axis_key", config, model)
        value = _spec(config.nbits_v, config.axis_value, "axis_value", config, model)
        window = residual_window(config.residual_length, deviations)
        return Plan.from_specs(model, dict.fromkeys(model.packed_layers, (key, value)), window=window)


def _spec(bits: Literal[2, 4], axis: int, field: str, config: Config, model: Fingerprint) -> TensorSpec:
    grouping = grouping_of(config.backend, axis, field)
    size = group_size_of(config.q_group_size, grouping, model, "q_group_size")
    return TensorSpec(bits=bits, grouping=grouping, group_size=size)


register(KVQ())
