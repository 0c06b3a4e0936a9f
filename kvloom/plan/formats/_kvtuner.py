"""KVTuner (arXiv 2502.04420, cmd2001/KVTuner): its cache configuration, and its bare tables of bits."""

from __future__ import annotations

from typing import Any

from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._validate import validated
from kvloom.plan.formats._base import PlanFormat, register
from kvloom.plan.formats._deviations import Deviations
from kvloom.plan.formats._document import is_table
from kvloom.plan.formats._kvtuner_in import Config, plan_of_config
from kvloom.plan.formats._kvtuner_out import config_of


class KVTuner(PlanFormat):
    """A whole configuration, as YAML or a dict."""

    name = "kvtuner"
    writes = True

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        if is_table(document):
            raise PlanError(
                f"a table of bits does not say how elements are grouped: read it as {' or '.join(SCHEMES)}, or put it "
                "under per_layer_config of a whole configuration."
            )
        return plan_of_config(validated(Config, document, self.name), model, deviations)

    def write(self, plan: Plan, deviations: Deviations) -> str:
        """See `PlanFormat.write`."""
        return _yaml(config_of(plan, deviations))


SCHEMES: dict[str, dict[str, Any]] = {
    "kvtuner-kivi": {"axis_key": 1, "axis_value": 0, "q_group_size": 32, "residual_length": 32},
    "kvtuner-pertoken": {"axis_key": 0, "axis_value": 0, "q_group_size": -1, "residual_length": 0},
}
"""Settings that KVTuner's published tables were searched and scored with (`helper_scripts/sh_gen_presets.py`).

Both run the vanilla quantiser, on an asymmetric grid (the default of `asym` in its `lm_eval` fork).
"""


class KVTunerTable(PlanFormat):
    """A bare table, ``{layer: {nbits_key, nbits_value}}`` or ``{layer: {head: {...}}}``, under one of the `SCHEMES`."""

    writes = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._scheme = {"backend": "vanilla", **SCHEMES[name], "asym": True, "force_quant": False}

    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """See `PlanFormat.read`."""
        if not is_table(document):
            raise PlanError(f"{self.name} is a table of layers: read a whole configuration as kvtuner.")
        kind = "per_head" if all(is_table(row) for row in document.values()) else "per_layer"
        config = {**self._scheme, f"{kind}_quant": True, f"{kind}_config": document}
        return plan_of_config(validated(Config, config, self.name), model, deviations)

    def write(self, plan: Plan, deviations: Deviations) -> str:
        """See `PlanFormat.write`."""
        config = config_of(plan, deviations)
        for field, value in self._scheme.items():
            if config[field] != value:
                raise PlanError(
                    f"{self.name} means {field} {value} and this plan has {config[field]}: write it as kvtuner, which "
                    "says so."
                )
        return _yaml(config.get("per_layer_config") or config["per_head_config"])


def _yaml(data: Any) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False))


register(KVTuner())
for _name in SCHEMES:
    register(KVTunerTable(_name))
