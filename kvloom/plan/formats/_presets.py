"""Published configurations by name: documents in foreign formats, read by those formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from kvloom._names import unknown
from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan._spec import format_layers
from kvloom.plan.formats import _kvtuner_tables as kvtuner
from kvloom.plan.formats._import import import_plan
from kvloom.plan.formats._kvmix import RATIOS

BIASED_KEYS = ("GPTNeoX", "Glm", "GptOss", "Phi4Multimodal", "PhiForCausalLM", "Qwen2", "SeedOss", "Starcoder2")
"""How the names of architectures begin whose keys have a bias. In a channel that RoPE turns fast a large one swings
with the position (by 111 in Qwen2.5's first layer, where the median channel's range is 1.9); turned by a Hadamard
transform all channels of that head swing (by 29)."""


@dataclass(frozen=True)
class _Preset:
    """A document, as a function of the model where every layer has its entry, and the one model it is for, if any.

    What its authors' code cannot run, or a plan not say, is replaced by the nearest where ``substitute`` is set.
    """

    form: str
    document: Callable[[Fingerprint], Any]
    only_for: Fingerprint | None = None
    substitute: bool = False


def preset(name: str, model: Any) -> Plan:
    """The plan that a published configuration means for ``model``.

    ``kivi/...`` are KIVI's (arXiv 2402.02750: groups of 32, the newest 128 tokens exact); ``kvtuner/...`` the 32 layer
    tables of KVTuner (arXiv 2502.04420), by the names of their files; ``kvmix/2bit-...`` KVmix's uniform 2 bits (arXiv
    2506.08018) with the exact share of its paper or of its repository, and likewise at its other widths (3 bits: keys
    in its words of eleven codes, 6.0 true bits here and 5.8 there, values in plain groups of 32, since its own do not
    run); ``kvq/K4V2`` the default of KVQ 0.0.x (arXiv
    2502.15075). ``kvloom/...`` are the best uniform plans measured here (``benchmarks/LOG.md``): keys per channel and
    values per token, both turned by a Hadamard transform, clip ranges searched, four sinks; ``kvloom calibrate
    --rotate`` (`kvloom.calibrate`) puts matrices calibrated for the model in the transform's place. Keys that have a
    bias are not turned, see `BIASED_KEYS`.

    Args:
        name: One of `presets`.
        model: A transformers model or config, or a `Fingerprint`.

    Raises:
        PlanError: There is no such preset (the message names the nearest), or its groups do not fit the model.
        ModelError: The preset is for another model.
    """
    known = _presets()
    if name not in known:
        raise PlanError(unknown("preset", name, known, listing="kvloom.plan.presets()"))
    found = known[name]
    fingerprint = Fingerprint.of_any(model)
    if found.only_for:
        found.only_for.check(fingerprint)
    return import_plan(found.document(fingerprint), found.form, fingerprint, substitute=found.substitute)


def find_plan(word: str, model: Any) -> tuple[str, Plan]:
    """A plan by its file, named by the file's stem, or by the name of a preset that ``model`` is given.

    Args:
        word: A ``.json`` file or one of `presets`.
        model: A transformers model or config, or a `Fingerprint`.

    Raises:
        PlanError: The file cannot be read, or there is no such preset.
        ModelError: The preset is for another model.
    """
    if word.endswith(".json") or Path(word).is_file():
        return Path(word).stem, Plan.load(word)
    return word, preset(word, model)


def presets() -> tuple[str, ...]:
    """Names that `preset` knows."""
    return tuple(_presets())


@cache
def _presets() -> dict[str, _Preset]:
    known = {f"kivi/K{bits}V{bits}": _Preset("kivi", partial(_kivi, bits)) for bits in (2, 4)}
    known |= {
        f"kvmix/{bits}bit-{ratios}": _Preset("kvmix", partial(_kvmix, bits, ratios), substitute=bits == 3)
        for ratios, shares in RATIOS.items()
        for bits in shares
    }
    known |= {f"kvloom/K{bits}V{bits}": _Preset("kvloom", partial(_kvloom, bits)) for bits in (2, 3, 4)}
    known["kvq/K4V2"] = _Preset("kvq", lambda _: {})
    for name, (model, scheme) in kvtuner.tables().items():
        known[f"kvtuner/{name}"] = _Preset(f"kvtuner-{scheme}", partial(_kvtuner, name), kvtuner.shape(model))
    return known


def _kivi(bits: int, _: Fingerprint) -> dict[str, int]:
    return {"k_bits": bits, "v_bits": bits}


def _kvmix(bits: int, ratios: str, model: Fingerprint) -> dict[str, Any]:
    return {"quant_bits": {layer: {"k_bits": bits, "v_bits": bits} for layer in model.packed_layers}, "ratios": ratios}


def _kvloom(bits: int, model: Fingerprint) -> dict[str, Any]:
    spec = {"bits": bits, "codec": "clipped"}
    turn = None if model.architecture.startswith(BIASED_KEYS) else "hadamard"
    entry = {
        "layers": format_layers(list(model.packed_layers)),
        "key": {**spec, "rotation": turn, "grouping": "per_channel", "group_size": 64},
        "value": {**spec, "rotation": "hadamard", "grouping": "per_token", "group_size": "head_dim"},
        "window": {"sinks": 4},
    }
    return {"model": model, "layers": [entry]}


def _kvtuner(name: str, _: Fingerprint) -> dict[int, dict[str, int]]:
    return kvtuner.table(name)
