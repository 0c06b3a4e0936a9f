"""kvloom: weave a KV cache out of threads of different precision.

Measure how much each layer's keys and values matter, plan their precision under a budget, run the model on a packed
cache, prove what it cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom._lazy import on_first_use
from kvloom._version import __version__

if TYPE_CHECKING:
    from kvloom.allocate import Budget
    from kvloom.assets import load_model
    from kvloom.cache import LoomCache, disable, enable
    from kvloom.generation import decode_loop
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
    "decode_loop": "kvloom.generation",
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
    "decode_loop",
    "disable",
    "enable",
    "load_model",
]

__getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
