"""Foreign plan formats and published presets: one file a format."""

from __future__ import annotations

from kvloom.plan.formats import _kivi, _kvloom, _kvmix, _kvq, _kvq_norm, _kvtuner, _modelopt
from kvloom.plan.formats._base import readable_formats, writable_formats
from kvloom.plan.formats._convert import convert
from kvloom.plan.formats._import import Exported, export_plan, import_plan
from kvloom.plan.formats._norm_budget import spend_bits, spend_groups
from kvloom.plan.formats._presets import find_plan, preset, presets

del _kivi, _kvloom, _kvmix, _kvq, _kvq_norm, _kvtuner, _modelopt  # imported to register their formats

__all__ = [
    "Exported",
    "convert",
    "export_plan",
    "find_plan",
    "import_plan",
    "preset",
    "presets",
    "readable_formats",
    "spend_bits",
    "spend_groups",
    "writable_formats",
]
