"""What one process holds of a model that transformers has split by heads (tensor parallelism)."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvloom._processes import world_size
from kvloom.plan import Fingerprint

# Layers whose output holds the keys, fused or not.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_SPLIT_BY_HEADS = "colwise"


class Shard(NamedTuple):
    """Which part of the KV heads a process holds, as `kvloom.Plan.shard` takes it."""

    rank: int
    world_size: int


def shard_of(model: Any) -> Shard:
    """The part of the KV heads that this process holds of a transformers model (or config).

    Configs and fingerprints of a sharded model are those of the whole model; its layers see their own heads. All heads
    are here where the model is not sharded, or where its plan (``tp_plan``) leaves the keys whole on every process.
    """
    if world_size(model) == 1 or not _splits_keys(model.tp_plan):
        return Shard(0, 1)
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return Shard(mesh.get_local_rank(), world_size(model))


def local_shape(model: Any) -> Fingerprint:
    """Shape of the cache that this process holds of a model: that of its own KV heads.

    Raises:
        ModelError: See `kvloom.Fingerprint.of`, and `kvloom.Plan.shard` for heads that cannot be split evenly.
    """
    return Fingerprint.of(model).shard(*shard_of(model))


def _splits_keys(plan: dict[str, str]) -> bool:
    return any(name.split(".")[-1] in _KEY_PROJECTIONS and style == _SPLIT_BY_HEADS for name, style in plan.items())
