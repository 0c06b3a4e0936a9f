from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom import Fingerprint, Plan, Profile, TensorSpec
from kvloom.plan import Evict, Window
from kvloom.signals import Calibration, EvictionTable, GradientNorms, LossTable

MODEL = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=4,
    packed_layers=[0, 1, 2, 3],
    num_kv_heads=2,
    head_dim=64,
    dtype="float16",
)
BITS = (2, 3, 4, 6, 8)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A made-up profile: layer l matters 10^l, halving with every bit."""
    grid = [[10.0**layer / 2**bits for bits in BITS] for layer in range(4)]
    heads = [[[share * loss for loss in row] for share in (0.9, 0.1)] for row in grid]
    still = [[0.0] * len(BITS)] * 4
    specs = [TensorSpec(bits=b, grouping="per_channel", group_size=64) for b in BITS]
    table = LossTable(
        model=MODEL,
        layers=[0, 1, 2, 3],
        key_specs=specs,
        value_specs=specs,
        key_loss=grid,
        value_loss=grid,
        key_spread=still,
        value_spread=still,
        key_head_loss=heads,
        value_head_loss=heads,
    )
    norms = [1.0, 2.0, 3.0, 4.0]
    gradient = GradientNorms(key=norms, value=norms, key_spread=norms, value_spread=norms)
    calibration = Calibration(sha256="0" * 64, texts=["t"], prompts=1, tokens=8, seed=0)
    evictions = EvictionTable(
        model=MODEL,
        window=Window(),
        prompt=2048,
        candidates=[Evict(policy=policy, budget=share) for policy in ("snapkv", "adakv") for share in (0.1, 0.5)],
        loss=[[0.2 * 10.0**layer, 0.01 * 10.0**layer, 0.1 * 10.0**layer, 0.005 * 10.0**layer] for layer in range(4)],
        spread=[[0.0] * 4] * 4,
        calibration=calibration,
        seconds=1,
    )
    made = Profile(model=MODEL, gradient=gradient, table=table, calibration=calibration, seconds=1, eviction=evictions)
    made.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "kv_plan.json"


def test_bits(kvloom, profile: Path, target: Path):
    done = kvloom("plan", profile, "--bits", "4", "--tokens", "4K", "-o", target)
    assert done.exit_code == 0, done.output
    plan = Plan.load(target)
    assert 3.0 < plan.true_bits(4096) <= 4.0
    assert plan.spec(3).key.bits > plan.spec(0).key.bits
    assert "for one sequence of 4096 tokens" in done.stdout


def test_bytes_per_token(kvloom, profile: Path, target: Path):
    kvloom("plan", profile, "--bytes-per-token", "500", "--tokens", "4096", "-o", target)
    assert 350 < Plan.load(target).nbytes(1, 4096) / 4096 <= 500


def test_memory(kvloom, profile: Path, target: Path):
    words = ["--memory", "8MiB", "--batch", "4", "--tokens", "4K", "-o", target]
    assert kvloom("plan", profile, *words).exit_code == 0
    assert 6 * 2**20 < Plan.load(target).nbytes(4, 4096) <= 8 * 2**20


def test_prefill_is_in_the_plan(kvloom, profile: Path, target: Path):
    words = ["--prefill", "quantized", "-o", target]
    assert kvloom("plan", profile, "--bits", "5", *words).exit_code == 0
    plan = Plan.load(target)
    assert plan.prefill == "quantized"


def test_kvmix_needs_no_budget(kvloom, profile: Path, target: Path):
    done = kvloom("plan", profile, "--method", "kvmix", "-o", target)
    assert done.exit_code == 0, done.output
    assert len(Plan.load(target).model.packed_layers) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "4", "--memory", "1GiB"], "give one budget"),
        (["--bits", "4", "--batch", "2"], "--batch goes with --memory"),
        (["--bits", "0.5"], "budget"),
        ([], "budget"),
        (["--memory", "1GiB", "--batch", "0"], "budget.batch is 0"),
        (["--bits", "4", "--dtype", "fp8"], "dtype 'fp8' is not known: give one of float16, bfloat16, float32"),
        (["--bits", "4", "--method", "magic"], "'magic' is unknown"),
        (["--memory", "6G"], "6GiB"),
    ],
)
def test_mistakes_are_one_line(kvloom, profile: Path, target: Path, words: list[str], message: str):
    failed = kvloom("plan", profile, *words, "-o", target)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not target.exists()


def test_fewer_tokens_and_bits_together(kvloom, profile: Path, target: Path):
    words = ["--memory", "2MiB", "--batch", "8", "--tokens", "2K", "-o", target]
    assert kvloom("plan", profile, *words).exit_code == 2  # bits alone do not get there
    done = kvloom("plan", profile, *words, "--evict", "auto")
    assert done.exit_code == 0, done.output
    plan = Plan.load(target)
    assert plan.nbytes(8, 2048) <= 2 * 2**20
    assert {plan.spec(i).evict.policy for i in range(4) if plan.spec(i).evict} == {"adakv"}
    assert "adakv keeps" in done.stdout
    kvloom("plan", profile, "--bits", "1.5", "--tokens", "2K", "-o", target, "--evict", "snapkv")
    plan = Plan.load(target)
    assert {plan.spec(i).evict.policy for i in range(4) if plan.spec(i).evict} == {"snapkv"}
    assert plan.true_bits(2048) <= 1.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evict", "h2o"], "no losses of policy 'h2o' (it has snapkv, adakv)"),
        (["--evict", "auto", "--method", "greedy"], "method 'greedy' does not"),
        (["--evict", "auto", "--by-head"], "--by-head"),
        (["--method", "joint", "--equal-in", "2"], "side constraints"),
        (["--evict", "auto", "--prefill", "quantized"], 'set prefill to "exact"'),
    ],
)
def test_mistakes_of_fewer_tokens_are_one_line(kvloom, profile: Path, target: Path, words: list[str], message: str):
    failed = kvloom("plan", profile, "--bits", "1", "--tokens", "2K", *words, "-o", target)
    assert failed.exit_code == 2
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not target.exists()


def test_a_profile_without_evictions_says_how_to_measure_them(kvloom, profile: Path, target: Path):
    Profile.load(profile).model_copy(update={"eviction": None}).save(profile)
    failed = kvloom("plan", profile, "--bits", "1", "--evict", "auto", "-o", target)
    assert failed.exit_code == 2
    assert "kvloom profile MODEL --evict auto" in failed.stderr


def test_show(kvloom, tmp_path: Path):
    plan = Plan.uniform(MODEL, key_bits=4, value_bits=2)
    plan.save(tmp_path / "p.json")
    done = kvloom("show", tmp_path / "p.json", "--tokens", "2K")
    assert done.stdout == plan.describe(2048) + "\n"


def test_schema_is_json_that_knows_the_fields(kvloom):
    schema = json.loads(kvloom("schema").stdout)
    assert set(schema["properties"]) >= {"schema_version", "model", "layers", "prefill"}


def bits_of(plan: Plan) -> list[tuple[int, int]]:
    return [(plan.spec(i).key.bits, plan.spec(i).value.bits) for i in range(4)]


def test_side_constraints(kvloom, profile: Path, target: Path):
    pytest.importorskip("scipy")
    words = ["--equal-in", "2", "--pairs", "K4V4,K4V2,K8V8", "--protect", "0:4", "--max-layouts", "2", "-o", target]
    done = kvloom("plan", profile, "--bits", "5", *words)
    assert done.exit_code == 0, done.output
    plan = Plan.load(target)
    found = bits_of(plan)
    assert set(found) <= {(4, 4), (8, 8)}  # the second layer of a block has the first one's bits
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert plan.provenance.certificate["constraints"].startswith("equal_in 2")


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_heads_decide(kvloom, profile: Path, target: Path, method: str):
    done = kvloom("plan", profile, "--bits", "4", "--by-head", "--method", method, "-o", target)
    assert done.exit_code == 0, done.output
    plan = Plan.load(target)
    first, second = (plan.spec(2).head(head) for head in range(2))
    assert first[0].bits > second[0].bits
    assert "1 heads apart" in done.stdout


def test_a_front_by_head(kvloom, profile: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = kvloom("plan", profile, "--front", tmp_path / "front", "--by-head")
    assert done.exit_code == 0, done.output
    plans = [Plan.load(path) for path in (tmp_path / "front").glob("plan-*.json")]
    assert any(entry.heads for plan in plans for entry in plan.layers)


@pytest.mark.parametrize("method", ["greedy", "kvq"])
def test_other_methods_take_the_budget(kvloom, profile: Path, target: Path, method: str):
    done = kvloom("plan", profile, "--bits", "4", "--method", method, "-o", target)
    assert done.exit_code == 0, done.output
    assert Plan.load(target).provenance.solver == method


def test_front(kvloom, profile: Path, tmp_path: Path, target: Path):
    pytest.importorskip("matplotlib")
    done = kvloom("plan", profile, "--front", tmp_path / "front", "--tokens", "2K", "-o", target)
    assert done.exit_code == 0, done.output
    listed = json.loads((tmp_path / "front" / "front.json").read_text())
    plans = [Plan.load(tmp_path / "front" / it["file"]) for it in listed["plans"]]
    assert f"wrote {len(plans)} plans" in done.stdout
    assert [plan.nbytes(1, 2048) for plan in plans] == [it["nbytes"] for it in listed["plans"]]
    assert not target.exists()


def test_max_kld_is_measured(kvloom, profile: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    """A meter that knows true bits and nothing else: 4 bits are enough."""

    def meter(profiled, *told):
        assert profiled == Profile.load(profile)
        assert told == ("some-model", 3, 512, 2, ["a.txt"], 0, None)
        return lambda plan: dict.fromkeys(("value", "low", "high"), 4.0 / plan.true_bits(4096) - 0.9)

    monkeypatch.setattr("kvloom.cli._plan.meter", meter)
    words = [
        "--model",
        "some-model",
        "--windows",
        "3",
        "--window",
        "512",
        "--at-once",
        "2",
        "--text",
        "a.txt",
        "-o",
        target,
    ]
    done = kvloom("plan", profile, "--max-kld", "0.1", "--tokens", "4K", *words)
    assert done.exit_code == 0, done.output
    plan = Plan.load(target)
    assert 4.0 <= plan.true_bits(4096) < 4.3
    tried = plan.provenance.certificate["tried"]
    assert done.stdout.count("measured ") == len(tried) > 3
    assert "measuring on 3 windows of 512 tokens of a.txt, some-model" in done.stdout
    assert plan.provenance.certificate["measured_on"] == "3 windows of 512 tokens of a.txt, some-model"
    assert "true bits: KLD 0." in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "4", "--max-kld", "0.1", "--model", "m"], "only one of them"),
        (["--bits", "4", "--front", "f"], "only one of them"),
        (["--max-kld", "0.1"], "measured on --model: give both"),
        (["--bits", "4", "--model", "m"], "measured on --model: give both"),
        (["--bits", "4", "--equal-in", "2", "--method", "kvq"], "need method exact, not 'kvq'"),
        (["--front", "f", "--method", "greedy"], "need method exact"),
        (["--bits", "4", "--by-head", "--method", "kvq"], "--by-head needs method exact or greedy, not 'kvq'"),
        (["--bits", "4", "--pairs", "4,4"], "cannot read the pairs"),
        (["--bits", "4", "--protect", "9:4"], "protect names layer 9"),
    ],
)
def test_goals_and_constraints_that_do_not_go_together(kvloom, profile, target, words: list[str], message: str):
    failed = kvloom("plan", profile, *words, "-o", target)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert not target.exists()


def test_search_measures_and_can_go_on(kvloom, profile: Path, target: Path, tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna", minversion="5")
    measured = []

    def meter(*told):
        def measure(plan: Plan) -> dict[str, float]:
            measured.append(bits_of(plan))
            return {"value": 1.0 / plan.spec(3).key.bits, "low": 0.0, "high": 1.0}

        return measure

    monkeypatch.setattr("kvloom.cli._search.meter", meter)
    words = ["--bits", "5", "--study", tmp_path / "search.log", "--sampler", "moead", "-o", target]
    for trials in ("10", "40"):
        done = kvloom("search", "some-model", profile, *words, "--trials", trials, "--front", tmp_path / "front")
        assert done.exit_code == 0, done.output
    plan = Plan.load(target)
    assert plan.spec(3).key.bits == 8
    assert plan.true_bits(8192) <= 5
    assert plan.provenance.certificate["trials"] == 40
    assert len(measured) <= 40
    assert (tmp_path / "front" / "front.json").exists()
    assert "budget is missing" in kvloom("search", "some-model", profile).stderr


def test_a_folder_of_an_output_is_made(kvloom, profile: Path, tmp_path: Path):
    target = tmp_path / "plans" / "3.json"
    assert kvloom("plan", profile, "--bits", "4", "-o", target).exit_code == 0
    assert Plan.load(target).true_bits(8192) <= 4


def test_a_file_in_the_place_of_a_front_is_refused(kvloom, tmp_path: Path, profile: Path):
    (tmp_path / "file").write_text("")
    failed = kvloom("plan", profile, "--front", tmp_path / "file")
    assert failed.exit_code == 2
    assert failed.stderr == f"error: the folder {tmp_path / 'file'} cannot be made (File exists): name another one.\n"
