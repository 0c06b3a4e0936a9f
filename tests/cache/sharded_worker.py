"""What one of several processes does that share a model: generate under every plan of a folder, and tell what it holds.

Run by torchrun; the argument is the folder that `tests.cache.test_sharded` has made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kvloom._processes import local_tensor
from kvloom.assets import SHAPES, load_model, random_model
from kvloom.cache import LoomCache, enable, fixed_nbytes, local_shape, shard_of
from kvloom.errors import CacheError, ModelError, PlanError
from kvloom.plan import Plan

NEW, ROOM = 30, 200


def prompt() -> torch.Tensor:
    """Token ids ``[2, 170]``."""
    return torch.randint(2, 97, (2, 170), generator=torch.Generator().manual_seed(3))


def generated(model: Any, plan: Plan, max_tokens: int | None) -> dict[str, Any]:
    """Tokens of ``generate`` through a cache, its bytes and what the plan says of them."""
    ids = prompt()
    cache = LoomCache(plan, model, max_tokens=max_tokens)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW, do_sample=False
    )
    cache.check()
    length, own = int(cache.get_seq_length()), plan.shard(*shard_of(model))
    said = own.nbytes(2, length, model.dtype, decoded=NEW - 1)
    if max_tokens is not None:
        said = fixed_nbytes(own, 2, max_tokens, model.dtype)
    heads = {layer.model.num_kv_heads for layer in cache.packed_layers.values()}
    return {"tokens": out.tolist(), "nbytes": cache.nbytes(), "said": said, "heads": sorted(heads)}


def error(work: Any) -> str:
    """What is raised."""
    try:
        work()
    except (CacheError, ModelError, PlanError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def ready(folder: Path, **options: Any) -> Any:
    """The folder's model in float64, whose roundings flip no code, with attention that reads pages."""
    model, _ = load_model(folder / "model", dtype=torch.float64, **options)
    model.generation_config.eos_token_id = None
    enable(model)
    return model


def main(folder: Path) -> None:
    model = ready(folder, sharded=True)
    shard = shard_of(model)
    told: dict[str, Any] = {"shard": shard, "heads": local_shape(model).num_kv_heads}
    for path in sorted((folder / "plans").glob("*.json")):
        plan = Plan.load(path)
        told[path.stem] = {"growing": generated(model, plan, None)}
        if plan.spec(0).evict is None:
            told[path.stem]["fixed"] = generated(model, plan, ROOM)
    told["competing"] = error(lambda: LoomCache(Plan.load(folder / "competing.json"), model))
    told["invariant"] = error(lambda: enable(model, batch_invariant=True))

    plan = Plan.load(folder / "plans" / "uniform.json")
    cache, ids = LoomCache(plan, model), prompt()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.save(folder / f"{shard.rank}.safetensors")
    again = LoomCache.load(folder / f"{shard.rank}.safetensors", plan, model)
    told["restored"] = [a.equal(b) for (_, a), (_, b) in zip(_tensors(cache), _tensors(again), strict=True)]
    torch.distributed.barrier()
    other = folder / f"{1 - shard.rank}.safetensors"
    told["other's"] = error(lambda: LoomCache.load(other, plan, model))
    told["random"] = drawn()
    (folder / f"{shard.rank}.json").write_text(json.dumps(told))


def drawn() -> dict[str, Any]:
    """Of a shape with random weights: the rows of keys that are here, their spread, and tokens through a plan."""
    SHAPES["tiny"] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    SHAPES["tiny"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = random_model("tiny", dtype=torch.float32, device=torch.device("cpu"), sharded=True)
    enable(model)
    keys = local_tensor(model.model.layers[0].self_attn.k_proj.weight.detach())
    tokens = generated(model, Plan.uniform(model, 8, 8), None)["tokens"]
    return {"rows": keys.shape[0], "spread": float(keys.std()), "tokens": tokens}


def _tensors(cache: LoomCache) -> list[tuple[str, torch.Tensor]]:
    return [named for layer in cache.packed_layers.values() for named in layer.tensors()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process as it exits
