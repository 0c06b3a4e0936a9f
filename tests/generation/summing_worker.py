"""What one of two processes does that share a tiny model: decode with compiled steps, with and without our sums.

Run by torchrun on the CPU, where steps are compiled for this test only; the argument is the folder to write to.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph

from kvloom import LoomCache, Plan, decode_loop, enable
from kvloom.assets import SHAPES, random_model
from kvloom.generation import _loop, _step
from kvloom.generation._passes import Passes
from kvloom.kernels import _cuda_sums

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}


class Seen(Passes):
    """The passes of a step, and what the graph calls before and after them."""

    def __call__(self, graph: Graph) -> None:
        self.before = self._calls(graph)
        super().__call__(graph)
        graph.lint()
        self.after = self._calls(graph)

    def uuid(self) -> Any:
        return None  # every graph is to be seen

    @staticmethod
    def _calls(graph: Graph) -> Counter[str]:
        return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def tokens(model: Any, **options: Any) -> list[list[int]]:
    """Token ids that a prompt of two sequences is continued by."""
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    cache = LoomCache(Plan.uniform(model, 8, 8), model, max_tokens=64)
    out: list[list[int]] = model.generate(ids, past_key_values=cache, custom_generate=decode_loop, **options).tolist()
    return out


def sums(rank: int) -> dict[str, list[float]]:
    """Of the operator, whose addend may lie in memory as it likes."""
    addend = torch.arange(12, dtype=torch.float32).view(3, 4) + 100 * rank
    kinds = {"contiguous": addend, "transposed": addend.T, "integers": addend.long()}
    return {name: torch.ops.kvloom.sum_ranks(x, "0").float().flatten().tolist() for name, x in kinds.items()}


def meetings(rank: int) -> list[bool]:
    """Whether ranks meet on the CPU, where rank 1 alone fails, where nothing arrives at it, and where all is well."""
    group, device = torch.distributed.group.WORLD, torch.device("cpu")
    opened: list[Any] = [_cuda_sums._meet(group, device)]
    _cuda_sums._is_able = lambda *_: True

    def failing(*_: Any) -> Any:
        if rank == 1:
            raise RuntimeError("no memory is shared")
        return opening()

    def opening(*_: Any) -> Any:
        return None, [1000, 2000], rank + 1

    for _cuda_sums._opened, _cuda_sums.arrives in (
        (failing, lambda _: True),
        (opening, lambda _: rank == 0),
        (opening, lambda _: True),
    ):
        opened.append(_cuda_sums._meet(group, device))
    assert opened[3].buffers.tolist() == [1001, 2002]
    return [meeting is not None for meeting in opened]


def main(folder: Path) -> None:
    SHAPES["tiny"] = SHAPE
    model = random_model("tiny", dtype=torch.float64, device=torch.device("cpu"), sharded=True)
    model.generation_config.eos_token_id = None
    enable(model)
    rank = torch.distributed.get_rank()
    told: dict[str, Any] = {"plain": tokens(model)}
    seen = _step._PASSES = Seen(_step._PASSES)
    _loop._compiles = lambda *_: True
    told["compiled"] = tokens(model)
    told["before"], told["after"] = seen.before, seen.after
    told["sums"], told["meetings"] = sums(rank), meetings(rank)
    (folder / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # or its threads may abort the process as it exits
