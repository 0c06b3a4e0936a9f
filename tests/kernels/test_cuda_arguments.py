"""What is launched fits the kernel's parameters, on its tensors' device; nothing runs, and no device is needed."""

from __future__ import annotations

import ctypes
import re
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvloom.kernels import (
    _cuda,
    _cuda_launch,
    _cuda_norms,
    _cuda_pages,
    _cuda_products,
    _cuda_sums,
    _cuda_turns,
    _nvrtc,
)
from kvloom.kernels._cuda_launch import Turns
from kvloom.pages import Format, PageLayout, Rotation, page_layout, page_tokens_of
from tests.kernels.codebooks import CASES, codebook_formats
from tests.kernels.kept import kept_case
from tests.kernels.pooled import next_step, pooled
from tests.kernels.tabled import mixed_layouts, tabled_case

HALF = torch.float16
SHARED = 227 * 1024
_SCALARS = {"int": ctypes.c_int32, "i64": ctypes.c_int64, "u64": ctypes.c_int64, "float": ctypes.c_float}


@pytest.fixture(params=[True, False], ids=["clusters", "no clusters"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Checks every launch, and notes its kernel."""
    seen: list[str] = []
    chosen: list[torch.device] = []

    @contextmanager
    def device(on: torch.device):
        chosen.append(on)
        yield
        chosen.pop()

    def module(source: str, defines: _nvrtc.Defines):
        assert chosen, "a kernel is loaded on whatever device is current"

        def launch(
            name: str, grid: Any, block: Any, *args: Any, shared: int = 0, cluster: int = 0, follows: bool = False
        ):
            seen.append(name)
            known = dict(defines)
            assert {x.device for x in args if isinstance(x, torch.Tensor)} == {chosen[-1]}
            threads = next((known[it] for it in ("THREADS", "GROUP") if it in known), None)
            assert block == (32 * int(known["WARPS"]) if threads is None else int(threads), 1, 1)
            assert follows == ("follow();" in _body(source, name, known))
            assert all(0 < size < 65536 for size in grid)
            assert grid[0] % (cluster or 1) == 0
            assert shared <= SHARED
            wanted = [_kind(each) for each in _parameters(source, name, known)]
            assert [type(_nvrtc._argument(each)) for each in args] == wanted

        return SimpleNamespace(launch=launch, active_clusters=lambda *_: 1 << 20)

    for user in (_nvrtc, _cuda_norms, _cuda_pages, _cuda_products, _cuda_sums):
        monkeypatch.setattr(user, "module", module)
    monkeypatch.setattr(_nvrtc, "shared_limit", lambda _: SHARED)
    monkeypatch.setattr(_cuda, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(_cuda, "_turns", lambda *_: torch.zeros(1 << 16, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0) if request.param else (8, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", device)
    _cuda_launch.merges_in_cluster.cache_clear()
    yield seen
    _cuda_launch.merges_in_cluster.cache_clear()


def _parameters(source: str, name: str, defines: dict[str, int | str]) -> list[str]:
    """Those of a kernel, by its source."""
    text = _chosen(_nvrtc._source(source), defines)
    text = re.sub(r"//.*", "", text)
    found = re.search(
        rf'extern "C" __global__ void\s+__launch_bounds__\(.*?\)\s+{name}\(([^)]*)\)\s*{{', text, re.DOTALL
    )
    assert found, name
    return [" ".join(each.split()) for each in found[1].split(",")]


def _body(source: str, name: str, defines: dict[str, int | str]) -> str:
    """A kernel's code."""
    text = _chosen(_nvrtc._source(source), defines)
    found = re.search(rf"\b{name}\([^)]*\)\s*{{(.*?)^}}", text, re.DOTALL | re.MULTILINE)
    assert found, name
    return found[1]


def _chosen(text: str, defines: dict[str, int | str]) -> str:
    """The lines that the macros leave, as far as kernels' parameters go."""
    kept, taken = [], [True]
    for line in text.splitlines():
        if condition := re.match(r"#if(n?def)? (.*?)(//.*)?$", line):
            taken.append(bool(condition[1]) or _holds(condition[2], defines))
        elif line.startswith("#else"):
            taken[-1] = not taken[-1]
        elif line.startswith("#endif"):
            taken.pop()
        elif all(taken):
            kept.append(line)
    return "\n".join(kept)


def _holds(condition: str, defines: dict[str, int | str]) -> bool:
    numbers = re.sub(r"_*[A-Z]\w*", lambda name: str(defines.get(name[0], 0)), condition)
    text = numbers.replace("&&", " and ").replace("||", " or ").replace("!", " not ")
    return bool(eval(text, {"__builtins__": {}}))


def _kind(parameter: str) -> type:
    """What stands for it in a launch: addresses are Python's ints."""
    return int if "*" in parameter else _SCALARS[parameter.removeprefix("const ").split()[0]]


def _layouts() -> list[PageLayout]:
    """Every grouping, both kinds of codes, sides that are not packed."""
    formats = [codebook_formats(case, 64) for case in range(CASES)]
    formats += [(Format(16, "per_channel", 64), Format(3, "per_token", 64)), (Format(5, "per_token", 32),) * 2]
    return [page_layout(*both, 64, 2, page_tokens_of(*both)) for both in formats]


@pytest.mark.parametrize("seed", range(6))
def test_caches_of_blocks(launches, seed: int):
    case = tabled_case(seed, mixed_layouts(seed, 64, 2), dtype=HALF)
    kv, _ = pooled(case.kv, 1)
    options = {"softcap": 20.0, "sink_logits": torch.zeros(case.query.shape[1])} if seed % 2 else {}
    _cuda.attend_pages(case.query, kv, scaling=0.1, **options)
    mask = torch.ones(len(case.query), 1, 1, case.kv.length, dtype=torch.bool)
    _cuda.attend_pages(case.query, case.kv, scaling=0.1, mask=mask if seed % 3 else None, lse=True, **options)
    one, queries, _ = case.one(int(case.kv.levels()[:, 0].argmax()), 2)
    _cuda.attend_pages(queries, one, scaling=0.1, **options)
    states = torch.zeros(2, len(case.query), kv.shape[1], 1, 64, dtype=HALF)
    _cuda_pages.append(*states, next_step(kv))
    _cuda_pages.append(*states, case.kv)
    groups = len(kv.pages)
    assert launches == ["attend"] * 3 * groups + ["append_token"] * 2 * groups


@pytest.mark.parametrize("seed", range(8))
def test_caches_whose_heads_keep_other_tokens(launches, seed: int):
    case = kept_case(seed, dtype=HALF)
    _cuda.attend_pages(case.query, case.kv, scaling=0.1, mask=case.mask)
    assert launches == ["attend"] * len(case.kv.pages)


@pytest.mark.parametrize("layout", _layouts())
def test_pages(launches, layout: PageLayout):
    states = torch.zeros(2, 1, 1, layout.page_tokens, 64, dtype=HALF)
    data = _cuda_pages.encode(*states, layout, torch.zeros(2, dtype=torch.int32))
    _cuda_pages.decode(data, layout, HALF)
    _cuda_pages.decode(data, layout, HALF, torch.zeros(3, 2, dtype=torch.int32))
    case = tabled_case(3, (layout,), dtype=HALF)
    _cuda.attend_pages(case.query, case.kv, scaling=0.1)
    _cuda_pages.append(*torch.zeros(2, len(case.query), 1, 1, 64, dtype=HALF), case.kv)
    assert launches == ["encode_pages", "decode_pages", "decode_pages", "attend", "append_token"]


def test_turned_states(launches):
    _cuda_pages.rotate(torch.zeros(2, 3, 70, 80, dtype=HALF))
    fmt = Format(4, "per_channel", 64, rotation="hadamard"), Format(2, "per_token", 80, rotation="hadamard")
    case = tabled_case(1, (page_layout(*fmt, 80, 2),), dtype=HALF)
    _cuda_pages.append(*torch.zeros(2, len(case.query), 1, 1, 80, dtype=HALF), case.kv)
    assert launches == ["rotate_states", "append_token"]


@pytest.mark.parametrize("count", [1, 4])
def test_products(launches, count: int):
    _cuda_products.products(
        torch.zeros(3, 128, dtype=HALF),
        [torch.zeros(32, 128, dtype=HALF)] * count,
        ([None, torch.zeros(32, dtype=HALF)] * 2)[:count],
    )
    assert launches == ["products"]


def test_gated_products(launches):
    x = torch.zeros(2, 128, dtype=HALF)
    assert _cuda_products.gated_product(x, *torch.zeros(2, 32, 128, dtype=HALF)).shape == (2, 32)
    assert launches == ["products"]


@pytest.mark.parametrize("channels", [4, 896, 4096, 5120, 16384])
@pytest.mark.parametrize("ranks", [1, 2])
def test_norms(launches, channels: int, ranks: int):
    x, residual, weight = (
        torch.zeros(3, channels, dtype=HALF),
        torch.zeros(3, channels, dtype=HALF),
        torch.ones(channels),
    )
    assert _cuda_norms.norms(x, residual, weight.to(HALF))
    meeting = None if ranks == 1 or not _cuda_norms.sums_rows(x) else _meeting()
    both = _cuda_norms.add_norm(x, residual, weight.to(HALF), 1e-5, meeting)
    assert [it.shape for it in both] == [x.shape] * 2
    assert launches == ["add_norm"]


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("turns", [Turns(), Turns(True, False), Turns(False, True), Turns(True, True)])
def test_positions_and_turns(launches, dim: int, turns: Turns):
    case = tabled_case(2, (_turned_layout(dim),), dtype=HALF)
    states, rope = torch.zeros(2, len(case.query), 1, 1, dim, dtype=HALF), torch.zeros(2, 1, 1, dim, dtype=HALF)
    assert _cuda_turns.ropes(states[0], tuple(rope))
    _cuda_pages.append(*states, case.kv, tuple(rope))
    kv, _ = pooled(case.kv, 1)
    for own in (case.kv, kv):
        _cuda.attend_pages(case.query, own, scaling=0.1, rope=tuple(rope), turns=turns)
        _cuda.attend_pages(case.query, own, scaling=0.1, turns=turns)
    assert launches == ["append_token"] + ["attend"] * 4


@pytest.mark.parametrize(
    ("rotations", "turns", "is_roped"),
    [
        (("hadamard", "hadamard"), Turns(True, True), True),
        ((None, "hadamard"), Turns(False, True), True),
        (("hadamard", "calibrated"), Turns(True, False), True),
        (("calibrated", None), Turns(False, False), False),
    ],
)
def test_what_formats_do_not_say_is_turned_before_and_behind(
    launches, rotations: tuple[Rotation | None, ...], turns: Turns, is_roped: bool, monkeypatch: pytest.MonkeyPatch
):
    """A matrix of the plan turns what has its positions."""
    formats = Format(4, "per_channel", 64), Format(4, "per_token", 64)
    key, value = (replace(fmt, rotation=it) for fmt, it in zip(formats, rotations, strict=True))
    case = tabled_case(2, (page_layout(key, value, 64, 2),), dtype=HALF)
    matrices = [None if it is None else 2 * torch.eye(64) for it in rotations]
    kv = replace(case.kv, query_turn=matrices[0], output_turn=matrices[1])
    attend, met = _cuda.attend_pages, []

    def watched(query, *args, **options):
        out, lse = attend(query, *args, **options)
        met.append((query, options["rope"] is not None, options["turns"]))
        return out.fill_(1), lse

    monkeypatch.setattr(_cuda, "attend_pages", watched)
    rope = (torch.ones(1, 1, 64, dtype=HALF), torch.zeros(1, 1, 64, dtype=HALF))
    out = _cuda._attend_unturned(case.query, kv, rope, scaling=0.1)
    ((query, *how),) = met
    assert how == [is_roped, turns]
    assert query.equal(case.query * (2 if rotations[0] == "calibrated" else 1))
    assert out.unique().tolist() == [2 if rotations[1] == "calibrated" else 1]
    assert launches == ["attend"]


@pytest.mark.parametrize("elements", [2, 1 << 16])
def test_sums(launches, elements: int):
    assert _cuda_sums.sum_ranks(torch.zeros(elements), _meeting()).shape == (elements,)
    assert launches == ["sum_ranks"]


def _meeting() -> _cuda_sums.Meeting:
    return _cuda_sums.Meeting(1, 2, torch.zeros(2, dtype=torch.int64), torch.ones(128, dtype=torch.int32), None)


def _first_reads(source: str, defines: _nvrtc.Defines, folder: Path) -> list[str]:
    """What a compiled kernel reads or writes in memory before it waits for earlier launches."""
    pytest.importorskip("cuda.core")
    backends = pytest.importorskip("triton.backends")
    disassembler = Path(backends.__file__).parent / "nvidia" / "bin" / "nvdisasm"
    if not disassembler.exists():
        pytest.skip("triton brings no nvdisasm")
    compiled = folder / "kernel.cubin"
    compiled.write_bytes(_nvrtc.cubin(source, defines, "sm_90"))
    text = subprocess.run([disassembler, compiled], capture_output=True, text=True, check=True).stdout
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", text)
    assert code.count("ACQBULK") == 1
    assert ("PREEXIT" in code) == (source != "attend.cu")  # nothing waits beside attention
    touches = ("LDG", "LD.", "STG", "ST.", "ATOM", "RED.", "LDGSTS", "UBLKCP")
    return [name for name in code[: code.index("ACQBULK")] if name.startswith(touches)]


def _turned_layout(dim: int = 128) -> PageLayout:
    key, value = Format(4, "per_channel", 64, rotation="hadamard"), Format(4, "per_token", dim, rotation="hadamard")
    return page_layout(key, value, dim, 2)


_ALL = {"is_roped": True, "turns": Turns(queries=True, outputs=True)}


@pytest.mark.parametrize(
    ("source", "defines", "allowed"),
    [
        ("products.cu", _cuda_products._build(torch.bfloat16, False, 8), "LDG.E.NA.128"),
        ("products.cu", _cuda_products._build(HALF, True, 8), "LDG.E.NA.128"),
        ("products.cu", _cuda_products._build(HALF, False, 2), "LDG.E.NA.128"),
        ("add_norm.cu", _cuda_norms._build(torch.bfloat16, 1024, 1, 1)[0], "LDG.E.64.CONSTANT"),
        ("add_norm.cu", _cuda_norms._build(HALF, 4096, 8, 1)[0], "LDG.E.64.CONSTANT"),
        ("sum_ranks.cu", _cuda_sums.rank_defines(torch.float32, 2, 1), None),
        ("rotate.cu", _cuda_pages.rotate_defines(HALF, 96), None),
        ("encode.cu", _cuda_pages._encode_build(_turned_layout(), HALF, append=True, roped=True)[0], None),
        ("attend.cu", _cuda_launch.Kernel(_turned_layout(), 8, False).defines(clustered=True), None),
        ("attend.cu", _cuda_launch.Kernel(_turned_layout(), 8, True, **_ALL).defines(clustered=True), None),
        ("attend.cu", _cuda_launch.Kernel(_turned_layout(80), 4, False, **_ALL).defines(clustered=False), None),
        ("attend.cu", _cuda_launch.Kernel(_turned_layout(), 4, True, masked=1, place=8).defines(clustered=False), None),
    ],
)
def test_a_kernel_that_begins_early_reads_nothing_but_weights(
    source: str, defines: _nvrtc.Defines, allowed: str | None, tmp_path: Path
):
    """As it is compiled: the order of the source does not bind the compiler."""
    reads = _first_reads(source, defines, tmp_path)
    assert set(reads) <= {allowed}
    assert bool(reads) == (allowed is not None)
