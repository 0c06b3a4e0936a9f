"""What a server builds before it serves is what its caches and prompts will launch; no device is needed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kvloom import kernels
from kvloom.codecs import signs
from kvloom.errors import KernelError
from kvloom.kernels import Reach, _cuda, _cuda_launch, _cuda_pages, _nvrtc
from kvloom.kernels._cuda_ahead import Device, pooled_builds
from kvloom.kernels._cuda_launch import Turns
from kvloom.pages import Format, page_layout
from tests.kernels.pooled import next_step, pooled
from tests.kernels.tabled import tabled_case

HOPPER, AMPERE = Device(132, 227 * 1024, has_clusters=True), Device(108, 163 * 1024, has_clusters=False)
TURNS = Turns(queries=True, outputs=True)
LAYOUTS = [page_layout(Format(4, "per_channel", 64), Format(2, "per_token", dim), dim, 2) for dim in (64, 128)] + [
    page_layout(
        Format(3, "per_channel", 64, rotation="hadamard"), Format(3, "per_token", 128, rotation="hadamard"), 128, 2
    )
]


@pytest.fixture(params=[HOPPER, AMPERE], ids=["hopper", "ampere"])
def launched(request, monkeypatch):
    """A device that launches nothing and notes what it would."""
    device, seen = request.param, set()

    def module(source, defines):
        seen.add((source, defines))
        return SimpleNamespace(launch=lambda *_, **__: None, active_clusters=lambda *_: 7)

    monkeypatch.setattr(_nvrtc, "module", module)
    monkeypatch.setattr(_cuda_pages, "module", module)
    monkeypatch.setattr(_nvrtc, "shared_limit", lambda _: device.shared_limit)
    monkeypatch.setattr(_cuda, "multiprocessors", lambda _: device.processors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0) if device.has_clusters else (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    _cuda_launch.merges_in_cluster.cache_clear()
    yield device, seen
    _cuda_launch.merges_in_cluster.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_met_that_was_not_built(launched, layout):
    device, seen = launched
    heads = 2
    for seed, (batch, most) in enumerate([(1, 4), (2, 30), (7, 3), (60, 2), (150, 1), (300, 4)]):
        case = tabled_case(seed, (layout,) * heads, dtype=torch.bfloat16, batch=batch, most=most)
        kv, _ = pooled(case.kv, 1)
        group = case.query.shape[1] // heads
        reach = Reach(group=group, sequences=300, pages=40, sinks=kv.num_sinks, is_capped=bool(seed % 2))
        softcap = 20.0 if reach.is_capped else None
        _cuda.attend_pages(case.query, kv, scaling=0.1, softcap=softcap, turns=TURNS)
        _cuda_pages.append(*torch.zeros(2, batch, heads, 1, layout.head_dim, dtype=torch.bfloat16), next_step(kv))
        one, queries, _ = case.one(0, 3)
        if one.num_pages and group * 3 <= one.page_tokens:
            _cuda.attend_pages(queries.expand(-1, -1, 3, -1).contiguous(), one, scaling=0.1, softcap=softcap)
        built = pooled_builds(heads, layout, torch.bfloat16, reach, device, TURNS)
        assert seen <= built
        seen.clear()
    assert len(built) < 40


@pytest.mark.parametrize(("queries", "tail"), [(1, 128), (8, 8), (8, 135)])
def test_every_number_of_pages_is_built_for(queries, tail):
    """One sequence alone: what other numbers of sequences are built for does not stand in."""
    layout = page_layout(Format(4, "per_channel", 128), Format(2, "per_token", 128), 128, 2, 128)
    heads, reach = 4, Reach(5, sequences=1, pages=200, sinks=4, is_capped=False)
    built, is_pooled = pooled_builds(heads, layout, torch.bfloat16, reach, HOPPER, TURNS), queries == 1
    facts = _cuda_launch.exact_units(reach.sinks, tail), HOPPER.processors, HOPPER.shared_limit
    met = set()
    for pages in range(1, reach.pages + 1):
        warps, splits = _cuda_launch.spread(layout, heads * -(-5 * queries // _cuda_launch.ROWS), pages, *facts)
        kernel = _cuda_launch.Kernel(layout, warps, True, int(not is_pooled), is_pooled=is_pooled)
        can_merge = {True} if splits == 1 else {True, False} if splits <= _cuda_launch.MAX_CLUSTER else {False}
        met |= {(_cuda_launch.SOURCE, kernel.defines(clustered=clustered)) for clustered in can_merge}
    assert len(met) > 2
    assert met <= built


def test_what_is_built_does_not_depend_on_torchs_defaults():
    """vLLM makes layers within a default device and dtype of its own."""
    reach = Reach(4, sequences=8, pages=8, sinks=0, is_capped=False)
    wanted = pooled_builds(2, LAYOUTS[2], torch.bfloat16, reach, HOPPER, TURNS)
    for cached in (_cuda_pages._encode_build, _cuda_pages.rotate_defines, signs):
        cached.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert pooled_builds(2, LAYOUTS[2], torch.bfloat16, reach, HOPPER, TURNS) == wanted
            assert signs("hadamard", 128).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_builds_are_compiled_side_by_side_and_kept(monkeypatch, tmp_path):
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    layout = LAYOUTS[0]
    builds = {
        ("encode.cu", _cuda_pages.encode_defines(layout, torch.float16, append=False)),
        ("decode.cu", _cuda_pages.decode_defines(layout, torch.float16, tabled=True)),
    }
    _nvrtc.build_all(builds, 0)
    kept = sorted(path.name.partition("-")[0] for path in (tmp_path / "kernels").iterdir())
    assert kept == ["decode", "encode"]
    monkeypatch.setattr(_nvrtc, "_compile", None)  # not called again
    _nvrtc.build_all(builds, 0)


def test_nowhere_to_keep_kernels_is_said(monkeypatch, tmp_path):
    (tmp_path / "kernels").write_text("no folder")
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.setattr(_nvrtc, "compiler_version", lambda: "13.0")
    monkeypatch.setattr(_nvrtc, "_compile", lambda *_: b"")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(KernelError, match="KVLOOM_CACHE"):
        _nvrtc.build_all([("rotate.cu", _cuda_pages.rotate_defines(torch.float16, 64))], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_nothing_is_compiled_behind_the_build(monkeypatch, layout):
    heads, device = 2, torch.device("cuda")
    cases = [
        tabled_case(seed, (layout,) * heads, device="cuda", dtype=torch.bfloat16, batch=batch, most=most)
        for seed, (batch, most) in enumerate([(1, 4), (2, 30), (7, 3), (60, 2), (300, 2)])
    ]
    for case in cases:
        kv, _ = pooled(case.kv, 1)
        reach = Reach(case.query.shape[1] // heads, sequences=300, pages=40, sinks=kv.num_sinks, is_capped=False)
        kernels.backend(device).build_pooled((layout,) * heads, torch.bfloat16, reach)
        with monkeypatch.context() as patch:
            patch.setattr(_nvrtc, "_compile", None)
            kernels.backend(device).attend_pooled(case.query, kv, scaling=0.1)
            states = torch.zeros(2, len(kv.table), heads, 1, layout.head_dim, dtype=torch.bfloat16, device=device)
            kernels.backend(device).append_pooled(*states, next_step(kv))
    torch.cuda.synchronize()
