"""The plan: what each layer and head stores."""

from __future__ import annotations

from kvloom.plan._bytes import (
    calibrated_formats,
    full_pages,
    has_matrices,
    head_layouts,
    itemsize,
    layer_nbytes,
    room_of,
    shared_nbytes,
)
from kvloom.plan._context import GPUS, longest_context
from kvloom.plan._equal_bytes import evict_to_bytes
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan, Prefill, Provenance, plan_schema
from kvloom.plan._spec import (
    Evict,
    GroupSize,
    HeadPlan,
    LayerPlan,
    TensorSpec,
    Window,
    format_layers,
    parse_layers,
)
from kvloom.plan._tensors import PlanTensors, rotation_name
from kvloom.plan._validate import explain
from kvloom.plan.formats import (
    Exported,
    convert,
    export_plan,
    find_plan,
    import_plan,
    preset,
    presets,
    readable_formats,
    spend_bits,
    spend_groups,
    writable_formats,
)

__all__ = [
    "GPUS",
    "Evict",
    "Exported",
    "Fingerprint",
    "GroupSize",
    "HeadPlan",
    "LayerPlan",
    "Plan",
    "PlanTensors",
    "Prefill",
    "Provenance",
    "TensorSpec",
    "Window",
    "calibrated_formats",
    "convert",
    "evict_to_bytes",
    "explain",
    "export_plan",
    "find_plan",
    "format_layers",
    "full_pages",
    "has_matrices",
    "head_layouts",
    "import_plan",
    "itemsize",
    "layer_nbytes",
    "longest_context",
    "parse_layers",
    "plan_schema",
    "preset",
    "presets",
    "readable_formats",
    "room_of",
    "rotation_name",
    "shared_nbytes",
    "spend_bits",
    "spend_groups",
    "writable_formats",
]
