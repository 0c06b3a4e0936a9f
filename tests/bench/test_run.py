from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom import kernels
from kvloom.bench import Pair, Shape, bench_backends, bench_device, bench_kernels, draw_roofline, tables
from kvloom.bench import _dense as dense_module
from kvloom.bench._bytes import attend_bytes, dense_bytes, encode_bytes
from kvloom.bench._peers import Peer
from kvloom.errors import KernelError, PlanError
from kvloom.kernels import Backend

CPU = torch.device("cpu")


class Forgetful(Backend):
    """Works, but for one element of its output."""

    name = "forgetful"

    def __init__(self):
        self.works = kernels.backend(CPU)

    def encode(self, key, value, layout):
        return self.works.encode(key, value, layout)

    def decode(self, data, layout, dtype):
        return self.works.decode(data, layout, dtype)

    def attend(self, query, kv, **options):
        written = self.works.attend(query, kv, **options)
        out = torch.empty_like(written)
        out.view(-1)[1:] = written.view(-1)[1:]
        return out


class Refusing(Forgetful):
    """Takes no cache."""

    name = "refusing"

    def attend(self, query, kv, **options):
        raise KernelError("pages of 64 tokens are not supported\nand more")


@pytest.fixture
def several(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"good": kernels.backend(CPU), "forgetful": Forgetful(), "refusing": Refusing(), "triton": "needs a GPU."}
    monkeypatch.setattr(kernels, "backends", lambda device: known, raising=False)


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def test_every_case_is_measured(grid, quick):
    grid = replace(grid, shapes=(Shape(2, 256), Shape(2, 128), Shape(1, 128)), pairs=(Pair(4, 2), Pair(16, 3)))
    records = bench_kernels(grid, CPU)
    cases = [(shape, pair) for shape in grid.shapes for pair in grid.pairs]
    attends, encodes = of_kind(records, "kernel_attend"), of_kind(records, "kernel_encode")
    assert [record["nbytes"] for record in attends] == [attend_bytes(grid, *case) for case in cases]
    assert [record["nbytes"] for record in encodes] == [encode_bytes(grid, *case) for case in cases]
    denses = of_kind(records, "kernel_dense")
    assert [record["nbytes"] for record in denses] == [dense_bytes(grid, s) for s in grid.shapes for _ in range(2)]
    assert [(r["batch"], r["key_bits"]) for r in of_kind(records, "kernel_append")] == [
        (2, 4),
        (2, 16),
        (1, 4),
        (1, 16),
    ]
    assert len(of_kind(records, "kernel_ceilings")) == 1
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["run"] for record in records}) == 1
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_figures_of_a_record_agree(grid, quick):
    records = bench_kernels(grid, CPU)
    (ceilings,), (attend,) = of_kind(records, "kernel_ceilings"), of_kind(records, "kernel_attend")
    best = min(of_kind(records, "kernel_dense"), key=lambda record: record["seconds"])
    assert attend["bytes_per_s"] == pytest.approx(attend["nbytes"] / attend["seconds"])
    assert attend["share_of_read"] == pytest.approx(attend["bytes_per_s"] / ceilings["read_bytes_per_s"])
    assert attend["share_of_copy"] == pytest.approx(attend["bytes_per_s"] / ceilings["copy_bytes_per_s"])
    assert attend["times_bound"] == pytest.approx(1 / attend["share_of_read"])
    assert attend["times_dense"] == pytest.approx(best["seconds"] / attend["seconds"])
    assert (attend["dense"], attend["fault"], attend["method"]) == (best["name"], None, "wall")
    assert attend["bytes_allow"] == pytest.approx(best["nbytes"] / attend["nbytes"])
    assert 0 < attend["error"] < 1e-5
    assert all(0 < record["error"] < 1e-5 for record in of_kind(records, "kernel_dense"))
    assert all(math.isfinite(x) for record in records for x in record.values() if isinstance(x, float))
    assert attend["torch"] == torch.__version__
    assert (attend["device"], attend["driver"], attend["dtype"]) == ("cpu", None, "float32")


def test_half_precision(grid, quick):
    (attend,) = of_kind(bench_kernels(replace(grid, dtype=torch.bfloat16), CPU), "kernel_attend")
    assert 1e-4 < attend["error"] < 1e-2
    assert attend["fault"] is None


def test_backends_that_fail_do_not_end_the_run(grid, several):
    records = bench_kernels(grid, CPU)
    attends = {record["backend"]: record for record in of_kind(records, "kernel_attend")}
    assert list(attends) == ["good", "forgetful", "refusing"]
    assert attends["good"]["fault"] is None
    assert attends["forgetful"]["error"] is None
    assert "not written" in attends["forgetful"]["fault"]
    assert attends["refusing"]["skipped"] == "pages of 64 tokens are not supported"
    assert [(r["backend"], r["skipped"]) for r in of_kind(records, "kernel_backend")] == [("triton", "needs a GPU.")]
    assert [record["skipped"] for record in of_kind(records, "kernel_encode")] == [None] * 3
    shown = "\n".join(" ".join([*row]) for table in tables(records) for row in (*table.rows, table.notes))
    assert "not finite" in shown
    assert "pages of 64 tokens are not supported" in shown
    assert "triton: needs a GPU." in shown


def test_a_bug_in_a_backend_is_not_hidden_and_loses_nothing(grid, several, monkeypatch, tmp_path: Path):
    def broken(*args, **options):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(Refusing, "attend", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench_kernels(grid, CPU, out=tmp_path / "k.jsonl")
    written = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert {record["backend"] for record in of_kind(written, "kernel_attend")} == {"good", "forgetful"}


def test_chosen_backends(grid, several):
    records = bench_kernels(grid, CPU, backends=bench_backends(CPU, ["good"]))
    assert {record["backend"] for record in records if "backend" in record} == {"good"}
    with pytest.raises(
        KernelError, match=r"^on cpu --backends 'magic' is unknown; choose one of good, forgetful, refusing, triton\.$"
    ):
        bench_backends(CPU, ["magic"])
    with pytest.raises(KernelError, match=r"^--backends triton: needs a GPU\.$"):
        bench_backends(CPU, ["triton"])


def test_a_device_without_a_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "backends", lambda device: {"triton": "needs a GPU."}, raising=False)
    with pytest.raises(KernelError, match=r"^no backend works on cpu: needs a GPU\.$"):
        bench_backends(CPU)


def test_a_peer_that_fails_is_a_skipped_baseline(grid, quick, monkeypatch: pytest.MonkeyPatch):
    class Failing(Peer):
        name = "failing"

        def prepare(self, query, key, value, scaling):
            raise RuntimeError("No available kernel.\nAborting execution.")

    monkeypatch.setattr("kvloom.bench._run.peers", lambda device: [Failing()])
    records = bench_kernels(grid, CPU)
    (dense,), (attend,) = of_kind(records, "kernel_dense"), of_kind(records, "kernel_attend")
    assert dense["skipped"] == "No available kernel."
    assert (attend["dense"], attend["times_dense"], attend["bytes_allow"]) == (None, None, None)
    assert dense_module.best_dense([dense]) is None
    (table, *_) = tables(records)
    assert "failing No available kernel." in table.notes[0]
    assert "-" in table.rows[0]


def test_a_second_run_replaces_its_cases_and_keeps_the_rest(grid, quick, tmp_path: Path):
    out = tmp_path / "runs" / "k.jsonl"
    first = bench_kernels(grid, CPU, out=out)
    again = bench_kernels(grid, CPU, out=out)
    other = bench_kernels(replace(grid, pairs=(Pair(1, 1),)), CPU, out=out)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == len(first) + 3  # attend, encode, append of the other pair
    assert {record["run"] for record in written} == {again[0]["run"], other[0]["run"]}


def test_progress_ends_where_it_said(grid, quick):
    told: list[tuple[int, int]] = []
    bench_kernels(grid, CPU, progress=lambda what, done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(len(told)))
    assert {total for _, total in told} == {len(told) - 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "--device 'tpu'"),
        ("meta", "--device 'meta' is not measured"),
        ("cuda:99", "there is no GPU cuda:99 here: --device cpu"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str):
    with pytest.raises(KernelError, match=message):
        bench_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_default_device_is_an_error():
    with pytest.raises(KernelError, match=r"^there is no GPU cuda here"):
        bench_device(None)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_roofline_is_drawn(grid, quick, tmp_path: Path, ending: str):
    pytest.importorskip("matplotlib")
    grid = replace(grid, shapes=(Shape(1, 64), Shape(2, 128)), pairs=(Pair(4, 4), Pair(2, 2)))
    path = tmp_path / f"roofline.{ending}"
    draw_roofline(bench_kernels(grid, CPU), path)
    assert path.stat().st_size > 5000
    if ending == "svg":
        assert "<svg" in path.read_text()


def test_a_roofline_without_a_point_still_has_its_roofs(grid, several, monkeypatch, tmp_path: Path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("kvloom.bench._run.peers", lambda device: [])
    draw_roofline(bench_kernels(grid, CPU, backends=bench_backends(CPU, ["refusing"])), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_pictures_that_cannot_be_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(PlanError, match=r"--plot roofline\.txt: give a file that ends in one of .*png"):
        draw_roofline([], Path("roofline.txt"))
    with pytest.raises(PlanError, match="does not exist"):
        draw_roofline([], tmp_path / "none" / "roofline.png")


@pytest.mark.gpu
def test_on_a_gpu(grid):
    device = bench_device(None)
    grid = replace(grid, shapes=(Shape(1, 1024),), dtype=torch.float16, head_dim=128)
    records = bench_kernels(grid, device)
    attends = of_kind(records, "kernel_attend")
    assert attends
    assert all(record["error"] < 2e-3 for record in attends if record["skipped"] is None)
    denses = {record["name"]: record for record in of_kind(records, "kernel_dense")}
    assert denses["sdpa-flash"]["method"] == "graph"
    assert denses["sdpa-flash"]["error"] < 2e-3
    assert records[0]["device"] == torch.cuda.get_device_name()
    assert records[0]["driver"]
