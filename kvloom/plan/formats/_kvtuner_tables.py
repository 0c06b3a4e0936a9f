"""The 32 layer tables that KVTuner publishes (cmd2001/KVTuner, `calibration_presets/*.yaml`).

A file's name is ``MODEL_SCHEME_KVTunerLIMIT_PICK``: found by its search under a limit of 4 or 6 bits, two picks each.
All were searched on GSM8K prompts, for the models whose shapes stand here (their `config.json`).
"""

from __future__ import annotations

import re
from typing import Any

from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._spec import parse_layers

_SHAPES: dict[str, tuple[str, int, int, int]] = {
    "Meta-Llama-3.1-8B-Instruct": ("LlamaForCausalLM", 32, 8, 128),
    "Mistral-7B-Instruct-v0.3": ("MistralForCausalLM", 32, 8, 128),
    "Qwen2.5-3B-Instruct": ("Qwen2ForCausalLM", 36, 2, 128),
    "Qwen2.5-7B-Instruct": ("Qwen2ForCausalLM", 28, 4, 128),
}
"""Architecture, layers, KV heads, head_dim."""

_TABLES: dict[str, dict[str, str]] = {
    "Meta-Llama-3.1-8B-Instruct": {
        "kivi_KVTuner4_0": "K8V8 0; K4V4 1-3,7,29,31; K4V2 6,8-12,14-16,18-20,22,26,28,30; K2V2 4-5,13,17,21,23-25,27",
        "kivi_KVTuner4_1": "K8V4 13,17; K4V4 1-3,7,29,31; K4V2 5-6,8-12,14-16,18-24,26,28,30; K2V2 0,4,25,27",
        "kivi_KVTuner6_0": "K8V8 4-5,21,23-25,27; K4V8 1-3,7,29,31; K4V4 6,8-12,14-16,18-20,22,26,28,30; K2V2 0,13,17",
        "kivi_KVTuner6_1": (
            "K8V4 4,6,8-12,14-16,18-20,22,25-28,30; K4V4 1-3,7,29,31; K4V2 5,21,23-24; K2V4 0; K2V2 13,17"
        ),
        "pertoken_KVTuner4_0": "K4V8 0; K4V4 5-6,8-12,14-17,20-21,26,28,30; K4V2 1-4,7,13,18-19,22-25,27,29,31",
        "pertoken_KVTuner4_1": (
            "K8V8 0; K8V4 5-6,12,21,26,28; K4V4 8-11,14-17,20,30; K4V2 1-4,7,13,18,23-25,27,29,31; K2V2 19,22"
        ),
        "pertoken_KVTuner6_0": "K8V8 23-24,29; K8V4 1-18,20-21,25-28,30-31; K4V2 0; K2V2 19,22",
        "pertoken_KVTuner6_1": "K8V4 1-4,7-11,13-18,20,23-25,27,29-31; K4V4 0,5-6,12,19,21-22,26,28",
    },
    "Mistral-7B-Instruct-v0.3": {
        "kivi_KVTuner4_0": "K4V8 7-8,10,18; K4V4 2-4,16; K4V2 5,9,11-15,17,19-26,28,30; K2V2 0-1,6,27,29,31",
        "kivi_KVTuner4_1": "K4V8 0-1,31; K4V4 2-4,7-10,14,18; K4V2 11-13,15-17,19-20; K2V2 5-6,21-30",
        "kivi_KVTuner6_0": "K8V8 6,11-13,15,17,19-20,27,29; K8V4 5,21-26,28,30; K4V4 2-4,7-10,14,16,18; K2V2 0-1,31",
        "kivi_KVTuner6_1": (
            "K8V4 16; K4V8 0-4,7-8,10,18,31; K4V4 5,21-26,28,30; K4V2 11-13,15,17,19-20; K2V2 6,9,14,27,29"
        ),
        "pertoken_KVTuner4_0": "K8V4 1-4,23,31; K4V4 0,5-6; K4V2 7-22,24-30",
        "pertoken_KVTuner4_1": "K8V8 5-6; K8V4 3-4,23,31; K4V8 0; K4V2 1-2,7-22,24-30",
        "pertoken_KVTuner6_0": "K8V4 1-2,7-22,24-30; K4V4 3-6,23,31; K2V4 0",
        "pertoken_KVTuner6_1": "K8V4 7-22,24-30; K4V8 0; K4V4 3-4,23,31; K4V2 1-2,5-6",
    },
    "Qwen2.5-3B-Instruct": {
        "kivi_KVTuner4_0": "K4V8 0-1; K4V4 34-35; K4V2 3,5-11,13-27,29-33; K2V4 2,4; K2V2 12,28",
        "kivi_KVTuner4_1": (
            "K8V8 0-1; K4V4 3,5-7,11,13,23,25,32-33; K4V2 8-10,14-22,24,26-27,29-31; K2V4 34-35; K2V2 2,4,12,28"
        ),
        "kivi_KVTuner6_0": "K4V8 0-1; K4V4 34-35; K4V2 3,5-11,13-27,29-33; K2V4 2,4; K2V2 12,28",
        "kivi_KVTuner6_1": (
            "K8V8 0-1; K8V4 5,7,25,32-33; K4V8 3,6,11,13,23; K4V4 2,4; K4V2 8-10,14-22,24,26-27,29-31; "
            "K2V4 34-35; K2V2 12,28"
        ),
        "pertoken_KVTuner4_0": "K8V8 18,27,29; K8V4 0; K4V4 10,19,24,26,33; K4V2 1-9,11-17,20-23,25,28,30-32,34-35",
        "pertoken_KVTuner4_1": (
            "K8V4 17-18,27,29-31,34; K8V2 0; K4V4 7,10-11,16,19,21-22,24-26,28,32-33; K4V2 1-6,8-9,12-15,20,23,35"
        ),
        "pertoken_KVTuner6_0": (
            "K8V8 0; K8V4 1,3-6,8-10,12-13,15,17-20,24,26-27,29-31,33-34; K4V2 2,7,11,14,16,21-23,25,28,32,35"
        ),
        "pertoken_KVTuner6_1": (
            "K8V8 17-18,27,29-31,34; K8V4 0-1,3-6,8-9,12-13,15,20-22; K4V2 2,7,10-11,14,16,19,23-26,28,32-33,35"
        ),
    },
    "Qwen2.5-7B-Instruct": {
        "kivi_KVTuner4_0": "K8V8 0,2,6,11,15,17; K4V4 4-5,8,12,22-26; K2V2 1,3,7,9-10,13-14,16,18-21,27",
        "kivi_KVTuner4_1": "K8V8 0,2,6; K4V4 11,15,17; K4V2 4-5,12,22-25; K2V4 1,3; K2V2 7-10,13-14,16,18-21,26-27",
        "kivi_KVTuner6_0": (
            "K8V8 0,2,7,9-10,13-14,16,18-21,27; K8V4 4-5,12,22-25; K4V2 11,15,17; K2V4 1,3; K2V2 6,8,26"
        ),
        "kivi_KVTuner6_1": "K8V8 0,2,6-7,9-10,13-14,16,18-21,27; K4V2 11,15,17; K2V4 1,3; K2V2 4-5,8,12,22-26",
        "pertoken_KVTuner4_0": "K8V8 0; K8V2 3,13,27; K4V4 6-7,9-12,14-23,26; K4V2 1-2,4-5,8,24-25",
        "pertoken_KVTuner4_1": "K8V8 0,3,13,27; K8V4 6,19; K4V2 1-2,4-5,7-12,14-18,20-26",
        "pertoken_KVTuner6_0": "K8V8 0,7,9-12,15-18,21-23,26; K4V4 1-5,13-14,20,25,27; K4V2 6,19; K2V2 8,24",
        "pertoken_KVTuner6_1": "K8V4 8-9,12,14,16-18,20-22,24,26; K8V2 0,3,13,27; K4V4 1-2,4-7,10-11,15,19,23,25",
    },
}


def tables() -> dict[str, tuple[str, str]]:
    """File name without its ending -> model and scheme (``kivi`` or ``pertoken``)."""
    return {f"{model}_{table}": (model, table.partition("_")[0]) for model, rows in _TABLES.items() for table in rows}


def shape(model: str) -> Fingerprint:
    """Shape of the model a table was searched for."""
    architecture, layers, heads, dim = _SHAPES[model]
    return Fingerprint(
        architecture=architecture,
        num_layers=layers,
        packed_layers=tuple(range(layers)),
        num_kv_heads=heads,
        head_dim=dim,
    )


def table(name: str) -> dict[int, dict[str, Any]]:
    """What the YAML file called ``name`` holds."""
    model, _, rest = name.partition("_")
    rows: dict[int, dict[str, Any]] = {}
    for key, value, layers in re.findall(r"K(\d)V(\d) ([\d,-]+)", _TABLES[model][rest]):
        rows |= {layer: {"nbits_key": int(key), "nbits_value": int(value)} for layer in parse_layers(layers)}
    return dict(sorted(rows.items()))
