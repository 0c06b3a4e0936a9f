"""kvloom: weave a KV cache out of threads of different precision.

Measure how much each layer's keys and values matter, plan their precision under a budget, run the model on a packed
cache, prove what it cost.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvloom._version import __version__

if TYPE_CHECKING:
    from kvloom.allocate import Budget
    from kvloom.assets import load_model
    from kvloom.cache import LoomCache, disable, enable
    from kvloom.plan import Fingerprint, Plan, TensorSpec, Window
    from kvloom.signals import Profile, calibrate, compute_profile

_HOMES = {
    "Budget": "kvloom.allocate",
    "Fingerprint": "kvloom.plan",
    "LoomCache": "kvloom.cache",
    "Plan": "kvloom.plan",
    "Profile": "kvloom.signals",
    "TensorSpec": "kvloom.plan",
    "Window": "kvloom.plan",
    "calibrate": "kvloom.signals",
    "compute_profile": "kvloom.signals",
    "disable": "kvloom.cache",
    "enable": "kvloom.cache",
    "load_model": "kvloom.assets",
}

__all__ = [
    "Budget",
    "Fingerprint",
    "LoomCache",
    "Plan",
    "Profile",
    "TensorSpec",
    "Window",
    "__version__",
    "calibrate",
    "compute_profile",
    "disable",
    "enable",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that ``import kvloom`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
