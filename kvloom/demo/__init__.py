"""The whole path in one call: measure, plan, run, prove, on a real model."""

from __future__ import annotations

from kvloom.demo._lineup import KVMIX, SINKS, UNIFORM, Entry, exact_name, lineup, nominal_bits, uniform_name
from kvloom.demo._run import Demo, Sizes, run_demo, signal_record

__all__ = [
    "KVMIX",
    "SINKS",
    "UNIFORM",
    "Demo",
    "Entry",
    "Sizes",
    "exact_name",
    "lineup",
    "nominal_bits",
    "run_demo",
    "signal_record",
    "uniform_name",
]
