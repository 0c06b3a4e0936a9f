"""Signals: how much each layer's keys and values matter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom.signals._base import Evidence, Labels, Side, Signal, get, register
    from kvloom.signals._calibrate import calibrate
    from kvloom.signals._codebooks import calibrate_codebooks
    from kvloom.signals._compute import compute_profile, default_specs, rotated_specs
    from kvloom.signals._profile import Calibration, GradientNorms, Profile
    from kvloom.signals._rotations import calibrate_rotations
    from kvloom.signals._table import LossTable

_HOMES = {
    "Calibration": "kvloom.signals._profile",
    "Evidence": "kvloom.signals._base",
    "GradientNorms": "kvloom.signals._profile",
    "Labels": "kvloom.signals._base",
    "LossTable": "kvloom.signals._table",
    "Profile": "kvloom.signals._profile",
    "Side": "kvloom.signals._base",
    "Signal": "kvloom.signals._base",
    "calibrate": "kvloom.signals._calibrate",
    "calibrate_codebooks": "kvloom.signals._codebooks",
    "calibrate_rotations": "kvloom.signals._rotations",
    "compute_profile": "kvloom.signals._compute",
    "default_specs": "kvloom.signals._compute",
    "get": "kvloom.signals._base",
    "register": "kvloom.signals._base",
    "rotated_specs": "kvloom.signals._compute",
}

__all__ = [
    "Calibration",
    "Evidence",
    "GradientNorms",
    "Labels",
    "LossTable",
    "Profile",
    "Side",
    "Signal",
    "calibrate",
    "calibrate_codebooks",
    "calibrate_rotations",
    "compute_profile",
    "default_specs",
    "get",
    "register",
    "rotated_specs",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
