"""Sums over ranks in a compiled step become our operator, and tokens stay those of the step that is not compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from kvloom.generation._passes import Passes
from kvloom.generation._products import JoinProducts
from kvloom.generation._sums import SumRanks
from kvloom.kernels import SUM_NBYTES

HERE = Path(__file__).parent
LAYERS = 2
collectives = torch.ops._c10d_functional
ALL_REDUCE, WAIT = "_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes tells."""
    folder = tmp_path_factory.mktemp("summing")
    paths = [str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "summing_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_all_sums_of_a_compiled_step_are_ours(told: list[dict[str, Any]]):
    for it in told:
        sums = it["before"][ALL_REDUCE]
        assert sums - 2 * LAYERS in (0, 1)  # transformers 5.23 splits the embedding, too
        norms = it["after"]["kvloom.add_norm.default"]
        assert norms == 2 * LAYERS
        assert it["after"].get("kvloom.sum_ranks.default", 0) == sums - norms
        assert ALL_REDUCE not in it["after"]
        assert it["after"].get(WAIT, 0) == it["before"][WAIT] - sums  # that of the gathered logits stays
        assert it["after"]["kvloom.products.default"] == 3 * LAYERS + 1
        assert it["after"]["kvloom.gated_product.default"] == LAYERS


def test_tokens_are_those_of_the_step_that_is_not_compiled(told: list[dict[str, Any]]):
    assert told[0]["compiled"] == told[0]["plain"] == told[1]["plain"] == told[1]["compiled"]


def test_the_operator_sums_over_processes(told: list[dict[str, Any]]):
    expected = 2 * torch.arange(12.0).view(3, 4) + 100
    for it in told:
        assert it["sums"]["contiguous"] == it["sums"]["integers"] == expected.flatten().tolist()
        assert it["sums"]["transposed"] == expected.T.flatten().tolist()


def test_ranks_agree_whether_they_meet(told: list[dict[str, Any]]):
    assert [it["meetings"] for it in told] == [[False, False, False, True]] * 2


def rewritten(function: Any, *args: torch.Tensor, symbolic: bool = False) -> list[str]:
    """What a traced graph calls after the pass."""
    traced = make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*args)
    SumRanks()(traced.graph)
    traced.graph.lint()
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]


def reduced(x: torch.Tensor, kind: str) -> torch.Tensor:
    out: torch.Tensor = collectives.wait_tensor(collectives.all_reduce(x, kind, "0"))
    return out


def summed(x: torch.Tensor) -> torch.Tensor:
    return reduced(x, "sum")


def test_a_sum_of_few_bytes_is_ours():
    assert rewritten(lambda x: summed(summed(x) * 2), torch.ones(8, 64)) == [
        "kvloom.sum_ranks.default",
        "aten.mul.Tensor",
        "kvloom.sum_ranks.default",
    ]
    assert rewritten(summed, torch.ones(SUM_NBYTES // 4)) == ["kvloom.sum_ranks.default"]


@pytest.mark.parametrize(
    ("function", "elements"),
    [
        (summed, SUM_NBYTES // 4 + 1),
        (lambda x: reduced(x, "max"), 64),
        (lambda x: reduced(x, "avg"), 64),
        (lambda x: collectives.wait_tensor(collectives.all_gather_into_tensor(x, 2, "0")), 64),
    ],
)
def test_what_is_no_small_sum_is_left(function: Any, elements: int):
    calls = rewritten(function, torch.ones(elements))
    assert not [call for call in calls if "kvloom" in call]
    assert WAIT in calls


def test_a_sum_that_is_read_before_it_is_waited_for_is_left():
    def early(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = collectives.all_reduce(x, "sum", "0")
        return collectives.wait_tensor(total), total * 2

    assert ALL_REDUCE in rewritten(early, torch.ones(64))


def test_a_size_that_is_not_known_is_left():
    assert rewritten(summed, torch.ones(8, 64), symbolic=True) == [ALL_REDUCE, WAIT]


def test_passes_are_made_in_order_and_told_apart():
    made: list[str] = []

    class Noting(SumRanks):
        def __init__(self, name: str) -> None:
            self._name = name

        def __call__(self, graph: Graph) -> None:
            made.append(self._name)

        def uuid(self) -> Any:
            return self._name

    both = Passes(Noting("first"), Noting("second"))
    both(Graph())
    assert made == ["first", "second"]
    assert both.uuid() == ("first", "second")
    ours = Passes(JoinProducts(), SumRanks()).uuid()
    assert ours == Passes(JoinProducts(), SumRanks()).uuid() != Passes(SumRanks()).uuid()
