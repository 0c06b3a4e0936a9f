"""Which tokens to keep: one file a policy, one method that scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom._lazy import on_first_use
from kvloom.eviction._adakv import AdaKV
from kvloom.eviction._base import Policy, Pooling, make, names, register, registered
from kvloom.eviction._expected_attention import ExpectedAttention
from kvloom.eviction._h2o import H2O
from kvloom.eviction._key_norm import KeyNorm
from kvloom.eviction._presets import preset, presets
from kvloom.eviction._pyramidkv import PyramidKV
from kvloom.eviction._room import Room, slot_nbytes
from kvloom.eviction._snap_expected import SnapExpected
from kvloom.eviction._snapkv import SnapKV
from kvloom.eviction._streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from kvloom.eviction._choose import Chosen, best, choose
    from kvloom.eviction._seen import Reading, Seen, received

# Parameters and counts are for plans, which need no torch; what touches tensors loads on first use.
_TENSOR_HOMES = {
    "Chosen": "kvloom.eviction._choose",
    "Reading": "kvloom.eviction._seen",
    "Seen": "kvloom.eviction._seen",
    "best": "kvloom.eviction._choose",
    "choose": "kvloom.eviction._choose",
    "received": "kvloom.eviction._seen",
}

__all__ = [
    "H2O",
    "AdaKV",
    "Chosen",
    "ExpectedAttention",
    "KeyNorm",
    "Policy",
    "Pooling",
    "PyramidKV",
    "Reading",
    "Room",
    "Seen",
    "SnapExpected",
    "SnapKV",
    "StreamingLLM",
    "best",
    "choose",
    "make",
    "names",
    "preset",
    "presets",
    "received",
    "register",
    "registered",
    "slot_nbytes",
]

__getattr__ = on_first_use(__name__, _TENSOR_HOMES)
