"""Evaluation: what a cache costs in quality, bytes and time, every figure with its interval."""

from __future__ import annotations

from kvloom._ledger import Ledger, Record, fingerprint, pieces_path
from kvloom.evaluate._contestants import Contestant, dense_contestant, plan_contestant, plan_method, shared_prefill
from kvloom.evaluate._context import (
    Progress,
    check_model,
    conditions,
    model_name,
    reads_at_most,
    silent,
    surroundings,
)
from kvloom.evaluate._decode import WARM_UP, decode_speed
from kvloom.evaluate._drift import drift
from kvloom.evaluate._evaluate import evaluate
from kvloom.evaluate._fidelity import Protocol, fidelity
from kvloom.evaluate._live import live_bytes
from kvloom.evaluate._mean_score import mean_score
from kvloom.evaluate._memory import memory, weights_of
from kvloom.evaluate._meter import KldMeter
from kvloom.evaluate._needle import NeedleCase, needle, needle_cases, needle_prompt
from kvloom.evaluate._paired import paired_difference, paired_speed
from kvloom.evaluate._peers import BEST_AXES, Peers, peer_contestants
from kvloom.evaluate._random_plans import PlanCounts
from kvloom.evaluate._reader import Reader
from kvloom.evaluate._records import open_pieces, write_records, write_results
from kvloom.evaluate._reply import Request
from kvloom.evaluate._samples import samples
from kvloom.evaluate._signals import compare_signals
from kvloom.evaluate._through import attention, check_multiple
from kvloom.evaluate.tasks import Chosen, Settings, Task, choose, task_names

__all__ = [
    "BEST_AXES",
    "WARM_UP",
    "Chosen",
    "Contestant",
    "KldMeter",
    "Ledger",
    "NeedleCase",
    "Peers",
    "PlanCounts",
    "Progress",
    "Protocol",
    "Reader",
    "Record",
    "Request",
    "Settings",
    "Task",
    "attention",
    "check_model",
    "check_multiple",
    "choose",
    "compare_signals",
    "conditions",
    "decode_speed",
    "dense_contestant",
    "drift",
    "evaluate",
    "fidelity",
    "fingerprint",
    "live_bytes",
    "mean_score",
    "memory",
    "model_name",
    "needle",
    "needle_cases",
    "needle_prompt",
    "open_pieces",
    "paired_difference",
    "paired_speed",
    "peer_contestants",
    "pieces_path",
    "plan_contestant",
    "plan_method",
    "reads_at_most",
    "samples",
    "shared_prefill",
    "silent",
    "surroundings",
    "task_names",
    "weights_of",
    "write_records",
    "write_results",
]
