"""Evaluation: what a cache costs in quality, bytes and time, every figure with its interval."""

from __future__ import annotations

from kvloom.evaluate._contestants import Contestant, dense_contestant, plan_contestant
from kvloom.evaluate._context import Progress, check_model, conditions, model_name, silent
from kvloom.evaluate._decode import WARM_UP, decode_speed
from kvloom.evaluate._drift import drift
from kvloom.evaluate._fidelity import Protocol, fidelity
from kvloom.evaluate._ledger import Ledger, Record, fingerprint, pieces_path, write_records
from kvloom.evaluate._live import live_bytes
from kvloom.evaluate._needle import NeedleCase, needle, needle_cases, needle_prompt
from kvloom.evaluate._paired import paired_difference, paired_speed
from kvloom.evaluate._peers import BEST_AXES, Peers, peer_contestants
from kvloom.evaluate._samples import samples
from kvloom.evaluate._through import attention, check_multiple

__all__ = [
    "BEST_AXES",
    "WARM_UP",
    "Contestant",
    "Ledger",
    "NeedleCase",
    "Peers",
    "Progress",
    "Protocol",
    "Record",
    "attention",
    "check_model",
    "check_multiple",
    "conditions",
    "decode_speed",
    "dense_contestant",
    "drift",
    "fidelity",
    "fingerprint",
    "live_bytes",
    "model_name",
    "needle",
    "needle_cases",
    "needle_prompt",
    "paired_difference",
    "paired_speed",
    "peer_contestants",
    "pieces_path",
    "plan_contestant",
    "samples",
    "silent",
    "write_records",
]
