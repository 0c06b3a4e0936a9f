"""Speed and memory of `generate` with plans' caches and transformers' own, in the same run."""

from __future__ import annotations

from kvloom.bench.generation._fit import RESERVE, Capacity, Fit, fit, verify
from kvloom.bench.generation._generate import bench_generate
from kvloom.bench.generation._lineup import KINDS, check_kinds
from kvloom.bench.generation._loads import PRESETS, Load, Preset, check_loads, make_loads, make_preset
from kvloom.bench.generation._memory import is_out_of_memory
from kvloom.bench.generation._steps import StepTimes
from kvloom.bench.generation._table import fit_table, generate_tables

__all__ = [
    "KINDS",
    "PRESETS",
    "RESERVE",
    "Capacity",
    "Fit",
    "Load",
    "Preset",
    "StepTimes",
    "bench_generate",
    "check_kinds",
    "check_loads",
    "fit",
    "fit_table",
    "generate_tables",
    "is_out_of_memory",
    "make_loads",
    "make_preset",
    "verify",
]
