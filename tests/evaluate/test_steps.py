"""Steps through caches of fixed size give the records of growing ones, and errors come before records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvloom.cache import LoomCache, disable, enable
from kvloom.errors import CacheError
from kvloom.evaluate import NeedleCase, Protocol, dense_contestant, drift, fidelity, needle, plan_contestant, samples
from kvloom.evaluate import _steps as steps_module
from kvloom.evaluate._live import grown_bytes
from kvloom.evaluate._steps import FEWEST_STEPS, stepwise_logits
from kvloom.evaluate._through import Prompt, attention, greedy
from kvloom.generation import Step
from kvloom.generation import _step as step_module
from kvloom.kernels import is_between_pages
from kvloom.plan import Evict, Fingerprint, Plan, TensorSpec, Window
from tests.cache import tiny
from tests.evaluate.tiny_llama import Letters, random_windows, tiny_model

PROMPT, TOKENS = 150, 230
PROTOCOL = Protocol(chunk=1, block=40, unscored=PROMPT, prompt=True)
MEASURED = ("seconds", "when")
AT_PROMPTS_END = {
    "snapkv": {"window": 8},
    "adakv": {"window": 8},
    "pyramidkv": {"window": 8},
    "streaming_llm": {"decode": False},
    "key_norm": {},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def calls(monkeypatch):
    """Makes caches fixed and steps as on a GPU, but for the graph; counts them."""
    ran: list[bool] = []
    make_step, run = steps_module.step_of, Step._run

    def step_of(*args, **kwargs):
        step = make_step(*args, **kwargs)
        step._waits = False
        return step

    def counted(step, cache):
        ran.append(is_between_pages())
        run(step, cache)

    monkeypatch.setattr(steps_module, "step_of", step_of)
    monkeypatch.setattr(steps_module, "_has_graphs", lambda _: True)
    monkeypatch.setattr(step_module, "_PLAIN_CALLS", 1 << 30)
    monkeypatch.setattr(Step, "_run", counted)
    return ran


def plain(model, prefill="exact", **window):
    plan = Plan.uniform(model, 4, 2, window=Window(sinks=4, **window))
    return plan_contestant(plan, model, name="plain", method="uniform", prefill=prefill)


def evicting(model, policy, budget=80, **parameters):
    plan = Plan.uniform(model, 4, 4, window=Window(sinks=4))
    evict = Evict(policy=policy, budget=budget, parameters=parameters)
    entries = tuple(entry.model_copy(update={"evict": evict}) for entry in plan.layers)
    return plan_contestant(plan.model_copy(update={"layers": entries}), model, name=policy, method="evict")


def growing(contestant):
    return replace(contestant, make_fixed=lambda _: None)


def assert_same(records, others):
    """Equal, but for the last digits of numbers that sums in another order change."""
    for record, other in zip(records, others, strict=True):
        assert record.keys() == other.keys()
        for name in record.keys() - {*MEASURED, "blocks", "kld", "slope", "ppl", "ppl_ratio", "kld_p99"}:
            assert record[name] == other[name], name
        for name in record.keys() & {"kld", "slope", "ppl", "ppl_ratio", "kld_p99"}:
            assert record[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("policy", ["none", "ratio", "quantized", *AT_PROMPTS_END])
def test_fidelity_after_a_prompt(model, calls, policy):
    plans = {"none": plain(model), "ratio": plain(model, recent_ratio=0.2), "quantized": plain(model, "quantized")}
    contestant = plans.get(policy) or evicting(model, policy, **AT_PROMPTS_END[policy])
    windows = random_windows(3, TOKENS)
    records = fidelity(model, windows, [contestant], protocol=PROTOCOL, batch=2)
    assert len(calls) == 2 * (TOKENS - PROMPT)
    assert 2 * 2 >= calls.count(False) > 0
    expected = fidelity(model, windows, [growing(contestant)], protocol=PROTOCOL, batch=2)
    assert len(calls) == 2 * (TOKENS - PROMPT)
    assert_same(records, expected)
    assert records[0]["blocks"]["kld"] == pytest.approx(expected[0]["blocks"]["kld"], rel=1e-3)
    assert records[0]["live_bytes"] == contestant.plan.nbytes(1, PROMPT, torch.float32)


@pytest.mark.parametrize("make", [dense_contestant, lambda model: evicting(model, "h2o")])
def test_what_only_grows_takes_passes(model, calls, make):
    fidelity(model, random_windows(1, TOKENS), [make(model)], protocol=PROTOCOL)
    assert len(calls) == 0


def test_which_caches_have_a_fixed_size(model, calls):
    assert plain(model).cache_for(200, FEWEST_STEPS).max_tokens == 200
    assert evicting(model, "snapkv").cache_for(200, FEWEST_STEPS).max_tokens == 200
    assert plain(model).cache_for(200, FEWEST_STEPS - 1).max_tokens is None
    assert evicting(model, "streaming_llm").cache_for(200, 100).max_tokens is None
    key, value = (
        TensorSpec(bits=4, grouping="per_channel", pre_rope=True),
        TensorSpec(bits=4, grouping="per_token", group_size=32),
    )
    before_rope = Plan.from_specs(Fingerprint.of(model), dict.fromkeys((0, 1), (key, value)))
    assert plan_contestant(before_rope, model, name="p", method="uniform").cache_for(200, 100).max_tokens is None
    apart = plan_contestant(tiny.mixed(model), model, name="p", method="uniform")
    assert apart.cache_for(200, 100).max_tokens is None
    sliding = tiny.build("gemma3")
    others = plan_contestant(tiny.eight_bit(sliding), sliding, name="p", method="uniform")
    assert others.cache_for(200, 100).max_tokens == 200
    enable(model, batch_invariant=True)
    assert plain(model).cache_for(200, 100).max_tokens is None
    disable(model)


def test_no_cache_has_a_fixed_size_on_a_cpu(model):
    assert plain(model).cache_for(200, 100).max_tokens is None


@pytest.mark.parametrize("make", [plain, lambda model: evicting(model, "snapkv", window=8)])
@torch.no_grad()
def test_greedy_writes_the_same(model, calls, make):
    contestant, prompt = make(model), Prompt(model, random_windows(1, 130))
    ours, theirs = (greedy(model, it, prompt, 70, frozenset()) for it in (contestant, growing(contestant)))
    assert len(calls) == 69
    assert ours.tokens == theirs.tokens
    assert int(ours.cache.get_seq_length()) == theirs.cache.get_seq_length() == 199
    assert ours.cache.max_tokens == 199
    (written,) = ours.tokens
    stop = frozenset([written[40]])
    ended, free = (greedy(model, it, prompt, 70, stop) for it in (contestant, growing(contestant)))
    assert ended.tokens == free.tokens == [written[: written.index(written[40])]]


@pytest.mark.parametrize("policy", AT_PROMPTS_END)
def test_needles_have_the_records_of_growing_caches(model, calls, policy):
    contestant = evicting(model, policy, budget=0.25, **AT_PROMPTS_END[policy])
    cases = [NeedleCase(400, 0.5, seed) for seed in range(2)]
    both = (contestant, growing(contestant))
    ours, theirs = (needle(model, Letters(), "A sentence. Another one.", [it], cases=cases) for it in both)
    assert len(calls) == 2 * 15
    assert_same(ours, theirs)
    assert ours[0]["live_bytes"] == contestant.plan.nbytes(1, 415, torch.float32, decoded=15)


def test_samples_have_the_records_of_growing_caches(model, calls):
    contestant, text = plain(model), "One prompt that fills a page or two. " * 5
    ours, theirs = (samples(model, Letters(), text, [it], tokens=20) for it in (contestant, growing(contestant)))
    assert len(calls) == 19
    assert_same(ours, theirs)


@pytest.mark.parametrize("make", [plain, lambda model: replace(plain(model), offset=4)])
def test_drift_steps_from_the_first_token(model, calls, make):
    windows, contestant, protocol = random_windows(1, 200), make(model), Protocol(chunk=1, block=32, unscored=64)
    (ours,) = drift(model, windows, [contestant], protocol=protocol)
    assert len(calls) == 200 - 1 - contestant.offset
    (theirs,) = drift(model, windows, [growing(contestant)], protocol=protocol)
    assert_same([ours], [theirs])
    assert ours["blocks"] == pytest.approx(theirs["blocks"], rel=1e-3)
    assert ours["live_bytes"] == contestant.plan.nbytes(1, 200, torch.float32)


@pytest.mark.parametrize("kind", ["plain", *AT_PROMPTS_END])
@torch.no_grad()
def test_bytes_are_those_of_the_growing_cache(model, calls, kind):
    contestant = plain(model) if kind == "plain" else evicting(model, kind, **AT_PROMPTS_END[kind])
    tokens, shape = random_windows(3, 170), contestant.plan.model
    counted = []
    for cache in (contestant.cache_for(300, 100), contestant.make_cache()):
        with attention(model, packed=True):
            logits = model(tokens, past_key_values=cache).logits[:, -1]
            before = grown_bytes(contestant, cache, shape)
            for _ in stepwise_logits(model, cache, random_windows(3, 70, seed=1), logits):
                pass
        counted.append((before, grown_bytes(contestant, cache, shape, decoded=70)))
    assert counted[0] == counted[1]
    assert counted[0][0] < counted[0][1]


@torch.no_grad()
def test_steps_give_the_scores_of_a_pass(model):
    plan, tokens = tiny.passthrough(model), random_windows(2, 100)
    expected = model(tokens).logits[:, 60:]
    for most in (100, None):
        cache = LoomCache(plan, model, max_tokens=most)
        with attention(model, packed=True):
            scores = model(tokens[:, :60], past_key_values=cache).logits[:, -1]
            blocks = list(stepwise_logits(model, cache, tokens[:, 60:], scores))
        assert [block.shape[1] for block in blocks] == [32, 8]
        torch.testing.assert_close(torch.cat(blocks, dim=1), expected, atol=1e-4, rtol=1e-4)


def score(model, out):
    fidelity(model, random_windows(2, TOKENS), [plain(model)], protocol=PROTOCOL, out=out)


def ask(model, out):
    needle(model, Letters(), "A sentence.", [plain(model)], cases=[NeedleCase(400, 0.5, 0)], out=out)


@pytest.mark.parametrize("work", [score, ask])
def test_what_steps_could_not_raise_comes_before_any_record(model, calls, work, monkeypatch, tmp_path):
    """On a GPU kernels set a flag where the growing cache raises."""
    real = Step._run

    def run(step, cache):
        real(step, cache)
        cache.layers[0].store.flags[0] = 1

    monkeypatch.setattr(Step, "_run", run)
    with pytest.raises(CacheError, match="NaN"):
        work(model, tmp_path / "out.jsonl")
    assert not any(path.read_text() for path in tmp_path.iterdir())


def test_a_killed_run_goes_on_to_the_same_records(model, calls, tmp_path, monkeypatch):
    out, windows = tmp_path / "out.jsonl", random_windows(3, TOKENS)
    contestants = [plain(model), evicting(model, "snapkv", window=8)]
    whole = fidelity(model, windows, contestants, protocol=PROTOCOL)
    left = iter(range(PROMPT, 2 * TOKENS))
    real = Step._run

    def killed(step, cache):
        if next(left) == 2 * PROMPT + TOKENS - 130:
            raise KeyboardInterrupt
        real(step, cache)

    monkeypatch.setattr(Step, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        fidelity(model, windows, contestants, protocol=PROTOCOL, out=out)
    monkeypatch.setattr(Step, "_run", real)
    before = len(calls)
    assert_same(fidelity(model, windows, contestants, protocol=PROTOCOL, out=out), whole)
    assert 0 < len(calls) - before < 6 * (TOKENS - PROMPT)
