"""A cache on disk: one safetensors file whose header carries the plan, so that a prefix is computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvloom.cache._layer import LoomLayer
from kvloom.cache._sliding import SlidingLayer
from kvloom.errors import CacheError

if TYPE_CHECKING:
    from kvloom.cache._cache import LoomCache

_FORMAT = "kvloom-cache-1"
_WHOLE = "rank 0 of 1"


def save(cache: LoomCache, path: Path) -> None:
    """See `LoomCache.save`."""
    if cache.get_seq_length() == 0:
        raise CacheError("the cache is empty; run a prompt through the model before saving it.")
    if any(layer.is_in_prompt for layer in cache.packed_layers.values()):
        raise CacheError("the cache is in the middle of a prompt; save it when the whole prompt has been read.")
    tensors: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"layers.{i}.{name}": t.contiguous() for name, t in _layer_tensors(layer, i)}
    header = {"format": _FORMAT, "plan": _plan_text(cache), "tokens": str(int(cache.get_seq_length()))}
    if cache.rope:
        header["inv_freq"] = str(cache.rope.inv_freq.tolist())
    if cache.shard.world_size > 1:
        header["shard"] = _shard_text(cache)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata=header)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise CacheError(f"cannot write the cache to {path}: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def restore(cache: LoomCache, path: Path, device: Any) -> None:
    """See `LoomCache.load`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(cache, header, path)
            # copied: safetensors gives views of the mapped file, which would change with it
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CacheError(f"there is no cache file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is not a whole cache file (cut short, or another kind of file): {error}.") from None
    for i, layer in enumerate(cache.layers):
        prefix = f"layers.{i}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        _restore_layer(layer, own, int(header["tokens"]))


def _shard_text(cache: LoomCache) -> str:
    return f"rank {cache.shard.rank} of {cache.shard.world_size}"


def _plan_text(cache: LoomCache) -> str:
    """The parts of the plan that decide what the bytes mean, in canonical form."""
    plan = cache.plan
    layers = {i: plan.spec(i).model_dump(mode="json", exclude={"layers"}) for i in plan.model.packed_layers}
    model = plan.model.model_dump(mode="json", exclude={"dtype"})
    tensors = {"tensors": plan.tensors.sha256} if plan.tensors else {}
    return json.dumps({"model": model, "layers": layers, "prefill": plan.prefill, **tensors}, sort_keys=True)


def _check_header(cache: LoomCache, header: dict[str, str], path: Path) -> None:
    if header.get("format") != _FORMAT:
        raise CacheError(f"{path} is a safetensors file but not a kvloom cache (no {_FORMAT} header).")
    if header.get("shard", _WHOLE) != _shard_text(cache):
        raise CacheError(
            f"{path} holds the KV heads of {header.get('shard', _WHOLE)} and this is {_shard_text(cache)}: load it "
            "with as many processes as it was saved by, each its own file."
        )
    if header.get("plan") != _plan_text(cache):
        raise CacheError(f"{path} was written under another plan; load it with the plan it was made with.")
    if cache.rope and header.get("inv_freq") != str(cache.rope.inv_freq.tolist()):
        raise CacheError(
            f"{path} holds keys before another rotary embedding than this model's; load it with the model it was made "
            "with, in the same dtype."
        )
    if not header.get("tokens", "").isdigit():
        raise CacheError(f"{path} does not say how many tokens it holds; it is damaged.")


def _layer_tensors(layer: Any, index: int) -> list[tuple[str, torch.Tensor]]:
    if isinstance(layer, LoomLayer | SlidingLayer):
        return list(layer.tensors())
    if type(layer) is DynamicSlidingWindowLayer:
        return [(name, t) for name, t in (("keys", layer.keys), ("values", layer.values)) if t is not None]
    if getattr(layer, "keys", None) is None and not hasattr(layer, "conv_states"):
        return []
    raise CacheError(f"layer {index} is a {type(layer).__name__}, whose state kvloom cannot save yet.")


def _restore_layer(layer: Any, tensors: dict[str, torch.Tensor], tokens: int) -> None:
    if isinstance(layer, LoomLayer) or (tensors and isinstance(layer, SlidingLayer)):
        layer.restore(tensors, tokens)
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = (tensors[name][:, :, 1 - layer.sliding_window :] for name in ("keys", "values"))
        layer.cumulative_length = tokens
