"""Signals: how much each layer's keys and values matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom._lazy import on_first_use

if TYPE_CHECKING:
    from kvloom.signals._base import Evidence, Labels, LayerSignal, ModelSignal, Side, Signal
    from kvloom.signals._calibrate import calibrate
    from kvloom.signals._calibration import Calibration
    from kvloom.signals._codebooks import calibrate_codebooks
    from kvloom.signals._compute import DEFAULT_SIGNAL, FOUR_SINKS, compute_profile, default_specs, rotated_specs
    from kvloom.signals._eviction import FOLLOWING, compute_eviction, default_candidates
    from kvloom.signals._eviction_table import EvictionTable
    from kvloom.signals._profile import GradientNorms, Profile
    from kvloom.signals._registry import get, register, registered, signals
    from kvloom.signals._rotations import calibrate_rotations
    from kvloom.signals._table import LossTable

_HOMES = {
    "DEFAULT_SIGNAL": "kvloom.signals._compute",
    "FOLLOWING": "kvloom.signals._eviction",
    "FOUR_SINKS": "kvloom.signals._compute",
    "Calibration": "kvloom.signals._calibration",
    "EvictionTable": "kvloom.signals._eviction_table",
    "Evidence": "kvloom.signals._base",
    "GradientNorms": "kvloom.signals._profile",
    "Labels": "kvloom.signals._base",
    "LayerSignal": "kvloom.signals._base",
    "LossTable": "kvloom.signals._table",
    "ModelSignal": "kvloom.signals._base",
    "Profile": "kvloom.signals._profile",
    "Side": "kvloom.signals._base",
    "Signal": "kvloom.signals._base",
    "calibrate": "kvloom.signals._calibrate",
    "calibrate_codebooks": "kvloom.signals._codebooks",
    "calibrate_rotations": "kvloom.signals._rotations",
    "compute_eviction": "kvloom.signals._eviction",
    "compute_profile": "kvloom.signals._compute",
    "default_candidates": "kvloom.signals._eviction",
    "default_specs": "kvloom.signals._compute",
    "get": "kvloom.signals._registry",
    "register": "kvloom.signals._registry",
    "registered": "kvloom.signals._registry",
    "rotated_specs": "kvloom.signals._compute",
    "signals": "kvloom.signals._registry",
}

__all__ = [
    "DEFAULT_SIGNAL",
    "FOLLOWING",
    "FOUR_SINKS",
    "Calibration",
    "EvictionTable",
    "Evidence",
    "GradientNorms",
    "Labels",
    "LayerSignal",
    "LossTable",
    "ModelSignal",
    "Profile",
    "Side",
    "Signal",
    "calibrate",
    "calibrate_codebooks",
    "calibrate_rotations",
    "compute_eviction",
    "compute_profile",
    "default_candidates",
    "default_specs",
    "get",
    "register",
    "registered",
    "rotated_specs",
    "signals",
]

__getattr__ = on_first_use(__name__, _HOMES)
