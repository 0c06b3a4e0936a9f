"""Allocation: what was measured and a budget become a plan."""

from __future__ import annotations

from kvloom._sizes import parse_bytes, parse_tokens
from kvloom.allocate._allocate import allocate
from kvloom.allocate._base import Allocator, allocators, get, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._constraints import Constraints, parse_pairs, parse_protect
from kvloom.allocate._exact import Exact
from kvloom.allocate._front import ExactFront
from kvloom.allocate._front_files import save_front
from kvloom.allocate._front_record import front_record
from kvloom.allocate._greedy import Greedy
from kvloom.allocate._joint import Joint
from kvloom.allocate._kvmix import KVmix
from kvloom.allocate._kvq import KVQ
from kvloom.allocate._kvtuner import KVTuner, Objective
from kvloom.allocate._max_kld import smallest_plan
from kvloom.allocate._study import StudySettings

__all__ = [
    "KVQ",
    "Allocator",
    "Budget",
    "Constraints",
    "Exact",
    "ExactFront",
    "Greedy",
    "Joint",
    "KVTuner",
    "KVmix",
    "Objective",
    "StudySettings",
    "allocate",
    "allocators",
    "front_record",
    "get",
    "parse_bytes",
    "parse_pairs",
    "parse_protect",
    "parse_tokens",
    "register",
    "save_front",
    "smallest_plan",
]
