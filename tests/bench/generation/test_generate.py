from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from kvloom.bench import Load, Shape, bench_generate, generate_tables, make_loads
from kvloom.bench._ceilings import Ceilings
from kvloom.bench.generation import _generate as run_module
from kvloom.bench.generation._fill import fill_random
from kvloom.bench.generation._fit import step_nbytes
from kvloom.bench.generation._generate import against_peers
from kvloom.bench.generation._lineup import PEERS, Lineup
from kvloom.bench.generation._measure import Job, measure, survives, weight_nbytes
from kvloom.cache import LoomCache, fixed_nbytes
from kvloom.errors import CacheError, DataError, ModelError, PlanError
from kvloom.evaluate import Peers, attention
from kvloom.plan import Evict, Plan
from kvloom.report import load_records

OURS = ("dynamic", "static", "growing", "fixed", "loop")
LOADS = (Load(2, 150),)


@pytest.fixture
def plan(tiny) -> Plan:
    return Plan.uniform(tiny, 4, 2)


@pytest.fixture
def bench(tiny, plan, quick):
    return partial(bench_generate, tiny, {"k4v2": plan}, new_tokens=12, repeats=1, kinds=OURS)


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def test_every_cache_is_measured_under_every_load(bench, tiny, plan, tmp_path: Path):
    loads, out = make_loads("B2x150,B1x70"), tmp_path / "runs" / "g.jsonl"
    records = bench(loads, out=out)
    cells = of_kind(records, "generate")
    names = ["dynamic", "static", "k4v2 growing", "k4v2 fixed", "k4v2 loop"]
    assert [(record["load"], record["name"]) for record in cells] == [(x.label, n) for x in loads for n in names]
    assert len(of_kind(records, "generate_ceilings")) == 1
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["run"] for record in records}) == 1
    assert json.loads(json.dumps(records, allow_nan=False)) == records == load_records(out)
    assert [path.name for path in out.parent.iterdir()] == ["g.jsonl"]
    dense = 2 * 2 * 2 * 2 * 32 * 4  # bytes of a token of two sequences
    held = 150 + 11  # the last token is never passed through the model
    expected = [held * dense, 162 * dense + 2 * 8, plan.nbytes(2, held), *[fixed_nbytes(plan, 2, 162)] * 2]
    assert [record["live_bytes"] for record in cells[:5]] == expected
    assert cells[0]["true_bits"] == pytest.approx(32)
    assert cells[2]["true_bits"] == pytest.approx(plan.true_bits(held))
    assert tiny.generation_config.pad_token_id is None
    assert tiny.config._attn_implementation == "sdpa"


def test_every_cell_begins_with_nothing_compiled(bench, monkeypatch: pytest.MonkeyPatch):
    """Or torch would give up on compiling after eight of them."""
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    cells = of_kind(bench(make_loads("B2x150,B1x70")), "generate")
    assert len(resets) == len(cells) == 10


def test_figures_of_a_record_agree(bench, tiny):
    records = bench(LOADS)
    (ceilings,), cells = of_kind(records, "generate_ceilings"), of_kind(records, "generate")
    best = max(cells[:2], key=lambda record: record["tokens_per_s"])
    for record in cells:
        assert record["weight_bytes"] == weight_nbytes(tiny) == sum(p.numel() * 4 for p in tiny.parameters())
        assert record["nbytes"] == record["weight_bytes"] + record["live_bytes"]
        assert record["bound_s"] == pytest.approx(record["nbytes"] / ceilings["read_bytes_per_s"])
        assert record["times_bound"] == pytest.approx(record["seconds"] / record["bound_s"])
        assert record["best_peer"] == best["name"]
        assert record["times_best_peer"] == pytest.approx(record["tokens_per_s"] / best["tokens_per_s"])
        assert record["p10"] <= record["seconds"] <= record["p90"]
        assert 2 / record["p90"] * 0.5 < record["tokens_per_s"] < 2 / record["p10"] * 2
        assert record["prefill_s"] > 0
        assert (record["compiled"], record["peak_bytes"], record["method"]) == (False, None, "wall")
        assert record["dtype"] == "float32"


def test_random_fill_says_so_and_times_no_prompt(bench):
    records = bench(LOADS, fill="random")
    cells = of_kind(records, "generate")
    assert {(record["fill"], record["prefill_s"]) for record in cells} == {("random", None)}
    assert cells[0]["live_bytes"] == (150 + 1 + 11) * 2 * 2 * 2 * 2 * 32 * 4
    (table,) = generate_tables(records)
    assert "random keys and values" in table.title
    assert {row[2] for row in table.rows} == {"-"}


@pytest.mark.parametrize("kind", OURS)
def test_random_states_fill_every_layer(tiny, plan, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr("kvloom.bench.generation._fill.FILL_ELEMENTS", 1)
    (contestant,) = Lineup(tiny, {"k4v2": plan}, [kind])(200)
    with attention(tiny, packed=contestant.plan is not None):
        cache = contestant.make_cache()
        fill_random(cache, tiny, 3, 170)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [170, 170]
    if isinstance(cache, LoomCache):
        cache.check()
        assert [layer.batch_size for layer in cache.packed_layers.values()] == [3, 3]


@pytest.mark.parametrize("policy", ["snapkv", "adakv", "h2o"])
def test_plans_that_evict_are_measured(tiny, quick, policy: str):
    evict = Evict(policy=policy, budget=0.5, parameters={"recent": 20} if policy == "h2o" else {"window": 20})
    plan = Plan.uniform(tiny, 4, 4)
    plan = plan.model_copy(update={"layers": tuple(x.model_copy(update={"evict": evict}) for x in plan.layers)})
    kinds, live = ("growing", "fixed"), {}
    for fill in ("random", "prompt"):
        records = bench_generate(tiny, {"kept": plan}, LOADS, new_tokens=12, repeats=1, kinds=kinds, fill=fill)
        growing, fixed = of_kind(records, "generate")
        assert growing["skipped"] is None
        if policy == "h2o":
            assert "does not show policy 'h2o' its steps" in fixed["skipped"]
            continue
        live[fill] = (growing["live_bytes"], fixed["live_bytes"])
    if live:
        assert live["random"] == (plan.nbytes(2, 162, decoded=12), fixed_nbytes(plan, 2, 162, prompt=150))
        assert live["prompt"] == (plan.nbytes(2, 161, decoded=11), fixed_nbytes(plan, 2, 162, prompt=150))


def test_layers_without_keys_are_not_filled(tiny):
    cache = DynamicCache(config=tiny.config)
    cache.layers[1] = LinearAttentionLayer()
    with pytest.raises(CacheError, match="without keys and values"):
        fill_random(cache, tiny, 1, 10)
    assert cache.get_seq_length() == 0


def test_survival_reaches_the_last_token(tiny, plan):
    job = Job(tiny, 30, "prompt", 1)
    for contestant in Lineup(tiny, {"k4v2": plan}, OURS)(130):
        made = []

        def make(contestant=contestant, made=made):
            made.append(contestant.make_cache())
            return made[-1]

        assert survives(job, replace(contestant, make_cache=make), Shape(2, 100))
        assert [int(cache.get_seq_length()) for cache in made] == [101, 129]


def test_a_killed_run_goes_on(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, real, seen = tmp_path / "g.jsonl", run_module.measure, []

    def counted(job, contestant, shape, ceilings):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(contestant.name)
        return real(job, contestant, shape, ceilings)

    monkeypatch.setattr(run_module, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        bench(LOADS, out=out)
    assert not out.exists()
    seen.append("killed")
    records = bench(LOADS, out=out)
    assert seen == ["dynamic", "static", "killed", "k4v2 growing", "k4v2 fixed", "k4v2 loop"]
    assert len(of_kind(records, "generate")) == 5
    assert len({record["run"] for record in records}) == 1
    bench(LOADS, out=out)
    assert seen[6:] == ["dynamic", "static", "k4v2 growing", "k4v2 fixed", "k4v2 loop"]
    assert len(load_records(out)) == 6


def test_what_runs_out_of_memory_is_said_and_the_run_goes_on(bench, monkeypatch: pytest.MonkeyPatch):
    real = run_module.measure

    def scarce(job, contestant, shape, ceilings):
        if contestant.name in ("static", "k4v2 growing"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return real(job, contestant, shape, ceilings)

    monkeypatch.setattr(run_module, "measure", scarce)
    records = bench(LOADS)
    cells = of_kind(records, "generate")
    assert [record["skipped"] for record in cells] == [None, "out of memory", "out of memory", None, None]
    assert cells[3]["best_peer"] == "dynamic"
    (table,) = generate_tables(records)
    assert table.rows[1][0] == "static: out of memory"


def test_every_cache_has_its_own_largest_batch(bench, tiny, plan, monkeypatch: pytest.MonkeyPatch):
    fit = {"dynamic": 5, "static": 4, "k4v2 growing": 20, "k4v2 fixed": 0, "k4v2 loop": 7}
    real, measured, tried = run_module.measure, [], []

    def survives(job, contestant, shape):
        tried.append(contestant.name)
        if shape.batch > fit[contestant.name]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return True

    def stricter(job, contestant, shape, ceilings):
        measured.append((contestant.name, shape.batch))
        if contestant.name == "k4v2 growing" and shape.batch > 18:
            raise torch.OutOfMemoryError("compiled steps take a little more")
        return real(job, contestant, shape, ceilings)

    monkeypatch.setattr(run_module, "survives", survives)
    monkeypatch.setattr(run_module, "measure", stricter)
    sequence = 2 * 2 * 2 * 32 * 68 * 4 + step_nbytes(tiny.config, 68, torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * sequence + 500, 0))  # room for five without a plan
    job = Job(tiny, 4, "random", 1)
    run = run_module._Run(job, Lineup(tiny, {"k4v2": plan}, OURS), [Load(None, 64)], "tiny", None, lambda *_: None)
    cells = of_kind(list(run.records()), "generate")
    assert [record["batch"] for record in cells] == [5, 4, 18, None, 7]
    assert cells[3]["skipped"] == "out of memory"
    assert measured == [
        ("dynamic", 5),
        ("static", 4),
        *(("k4v2 growing", batch) for batch in (20, 19, 18)),
        ("k4v2 loop", 7),
    ]
    assert tried.count("dynamic") == 2  # it, and one more


def test_other_peoples_failures_are_said_and_ours_raised(bench, monkeypatch: pytest.MonkeyPatch):
    real = run_module.measure

    def failing(names, job, contestant, shape, ceilings):
        if contestant.name in names:
            raise TypeError("unsupported axis\nand more")
        return real(job, contestant, shape, ceilings)

    monkeypatch.setattr(run_module, "measure", partial(failing, ["dynamic"]))
    assert of_kind(bench(LOADS), "generate")[0]["skipped"] == "unsupported axis"
    monkeypatch.setattr(run_module, "measure", partial(failing, ["k4v2 fixed"]))
    with pytest.raises(TypeError):
        bench(LOADS)


def test_what_a_fixed_cache_cannot_hold_is_said(tiny, quick):
    from tests.bench.generation.test_fit import pre_rope

    records = bench_generate(tiny, {"p": pre_rope(tiny)}, LOADS, new_tokens=4, repeats=1, kinds=["growing", "fixed"])
    growing, fixed = of_kind(records, "generate")
    assert growing["skipped"] is None
    assert "cannot pack keys before RoPE" in fixed["skipped"]
    assert growing["best_peer"] is growing["times_best_peer"] is None


def test_quantised_caches_and_why_they_are_missing(tiny, quick, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def peers(model, **options) -> Peers:
        asked.update(options)
        return Peers((), ("QuantizedCache on quanto is left out: ninja not installed.",))

    monkeypatch.setattr("kvloom.bench.generation._lineup.peer_contestants", peers)
    records = bench_generate(tiny, {}, LOADS, new_tokens=3, repeats=1, kinds=PEERS)
    assert asked == {"labels": ["best axes"]}
    assert [record["skipped"] for record in of_kind(records, "generate_note")] == [
        "QuantizedCache on quanto is left out: ninja not installed."
    ]
    assert "quanto is left out" in " ".join(generate_tables(records)[0].notes)


def test_lengths_that_a_cache_cannot_compress_are_said(tiny):
    (dynamic,) = Lineup(tiny, {}, ["dynamic"])(100)
    with pytest.raises(DataError, match="multiples of 8 tokens only, and the prompt has 70"):
        measure(Job(tiny, 4, "prompt", 1), replace(dynamic, token_multiple=8), Shape(1, 70), Ceilings(1, 1, 1))


def test_ratios_stay_within_a_load():
    def cell(load: str, rate: float, *, plan: bool, skipped: str | None = None) -> dict:
        fields = {"kind": "generate", "name": f"{load} {rate}", "load": load, "plan": plan, "skipped": skipped}
        return fields if skipped else {**fields, "tokens_per_s": rate}

    records = against_peers(
        [
            {"kind": "generate_ceilings"},
            cell("a", 10, plan=False),
            cell("a", 20, plan=False),
            cell("a", 30, plan=True),
            cell("b", 5, plan=False),
            cell("b", 40, plan=True),
            cell("c", 0, plan=False, skipped="out of memory"),
            cell("c", 7, plan=True),
        ]
    )
    ratios = [record.get("times_best_peer", "no field") for record in records]
    assert ratios == ["no field", 0.5, 1.0, 1.5, 1.0, 8.0, "no field", None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 1}, "1 new tokens, 1 repeats: give at least 2 new tokens"),
        ({"repeats": 0}, "12 new tokens, 0 repeats"),
        ({"loads": ()}, "nothing to measure"),
        ({"kinds": ["growing"], "plans": {}}, "nothing to measure"),
        ({"loads": (Load(None, 64),)}, r"the largest batch \(B\*\) is found by running out of a GPU's memory"),
    ],
)
def test_mistakes(tiny, plan, options: dict, message: str):
    asked = {"plans": {"k4v2": plan}, "loads": LOADS, "new_tokens": 12, "repeats": 1, "kinds": OURS, **options}
    with pytest.raises(DataError, match=message):
        bench_generate(tiny, asked.pop("plans"), asked.pop("loads"), **asked)


def test_plans_and_kinds_are_checked_before_anything_is_measured(tiny, plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "measure_ceilings", lambda *_: pytest.fail("measured"))
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"head_dim": 64})})
    with pytest.raises(ModelError, match="head_dim = 64"):
        bench_generate(tiny, {"k4v2": other}, LOADS)
    with pytest.raises(PlanError, match="codebook is missing"):
        bench_generate(tiny, {"nuq": Plan.uniform(tiny, 4, 4, value_codec="nuq")}, LOADS)
    with pytest.raises(PlanError, match=r"--caches 'paged' is unknown; choose one of .*dynamic"):
        bench_generate(tiny, {"k4v2": plan}, LOADS, kinds=["paged"])
    with pytest.raises(ModelError, match="training mode"):
        bench_generate(tiny.train(), {"k4v2": plan}, LOADS)
    tiny.eval()


def test_a_cache_that_is_used_again_starts_empty(bench):
    static = of_kind(bench(LOADS, repeats=2), "generate")[1]
    assert static["name"] == "static"  # the one whose steps compile, on a GPU; others are made anew
    assert static["true_bits"] == pytest.approx(32 * 162 / 161, rel=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_steps_are_compiled_and_memory_is_told(quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kvloom.assets import SHAPES, random_model
    from tests.bench.generation.conftest import TINY

    monkeypatch.setitem(SHAPES, "tiny", {**TINY, "head_dim": 64})
    model = random_model("tiny", dtype=torch.bfloat16, device=torch.device("cuda", 0))
    records = bench_generate(model, {"k4v4": Plan.uniform(model, 4, 4)}, make_loads("B2x512"), new_tokens=24)
    cells = {record["name"]: record for record in of_kind(records, "generate")}
    assert {
        name: cells[name]["compiled"] for name in ("dynamic", "static", "k4v4 growing", "k4v4 fixed", "k4v4 loop")
    } == {
        "dynamic": False,
        "static": True,
        "k4v4 growing": False,
        "k4v4 fixed": True,
        "k4v4 loop": True,
    }
    for record in cells.values():
        if record["skipped"] is None:
            assert record["peak_bytes"] > record["start_bytes"] >= record["weight_bytes"]
            assert record["method"] == "events"
