"""Parameters that others published, by name."""

from __future__ import annotations

from typing import Any

from kvloom._names import unknown
from kvloom.errors import PlanError

_Preset = tuple[str, dict[str, Any]]

# QPruningKV (arXiv 2412.12706), what its LongBench and RULER scripts set: a window of 8, max pooling over 7, one-shot
# eviction. Its scripts count budgets per query head; kvloom's are per KV head.
_QPRUNINGKV: dict[str, _Preset] = {
    "streaming_llm": ("streaming_llm", {"sinks": 4, "decode": False}),
    "h2o": ("h2o", {"recent": 8, "decode": False}),
    "snapkv": ("snapkv", {"window": 8, "kernel": 7, "pooling": "max"}),
    "pyramidkv": ("pyramidkv", {"window": 8, "kernel": 7, "pooling": "max", "beta": 20}),
}
_PRESETS = {f"qpruningkv/{name}": preset for name, preset in _QPRUNINGKV.items()}


def presets() -> tuple[str, ...]:
    """Names that `preset` knows. A policy without parameters has those of its paper."""
    return tuple(_PRESETS)


def preset(name: str) -> _Preset:
    """Policy and parameters of a preset, for a plan's evict entry.

    Raises:
        PlanError: There is none of this name.
    """
    if name not in _PRESETS:
        raise PlanError(unknown("eviction preset", name, sorted(_PRESETS)))
    policy, parameters = _PRESETS[name]
    return policy, dict(parameters)
