"""transformers cache layers made of pages plus an exact window; the registered attention and mask."""

from __future__ import annotations

from kvloom.cache._attention import ATTENTION, INVARIANT, disable, enable, loom_attention, reads_pages
from kvloom.cache._cache import LoomCache
from kvloom.cache._evicting import EvictingLayer
from kvloom.cache._fixed import FixedLayer
from kvloom.cache._fixed_bytes import fixed_nbytes
from kvloom.cache._kept_kv import KeptKV
from kvloom.cache._layer import LoomLayer
from kvloom.cache._made_by import made_by
from kvloom.cache._rope import Rope, rope_of
from kvloom.cache._rotation import SideRotation, side_rotation
from kvloom.cache._shard import Shard, local_shape, shard_of
from kvloom.cache._step_layer import StepLayer

__all__ = [
    "ATTENTION",
    "INVARIANT",
    "EvictingLayer",
    "FixedLayer",
    "KeptKV",
    "LoomCache",
    "LoomLayer",
    "Rope",
    "Shard",
    "SideRotation",
    "StepLayer",
    "disable",
    "enable",
    "fixed_nbytes",
    "local_shape",
    "loom_attention",
    "made_by",
    "reads_pages",
    "rope_of",
    "shard_of",
    "side_rotation",
]
