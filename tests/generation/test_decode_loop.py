"""`decode_loop` gives the tokens of `generate`, whatever is asked of it, and leaves the same cache."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, set_seed
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from kvloom import decode_loop
from kvloom.cache import LoomCache, disable, enable
from kvloom.errors import CacheError, ModelError
from kvloom.generation import _loop, _step, serves
from kvloom.kernels import is_between_pages
from kvloom.plan import Evict, Window
from tests.cache import tiny

ROOM = 400
PLANS = {
    "eight bits": tiny.eight_bit,
    "mixed": tiny.mixed,
    "window": lambda model: tiny.mixed(model, window=Window(sinks=4, recent=20)),
    "ratio": lambda model: tiny.mixed(model, window=Window(sinks=2, recent_ratio=0.2)),
}


@pytest.fixture(scope="module")
def model():
    """In float64, so that masks made in two ways cannot flip a code."""
    return tiny.exact("llama")


@pytest.fixture
def plan(model):
    return tiny.mixed(model, window=Window(sinks=4))


def both(model, plan, prompt, new=24, caches=None, **options):
    """Outputs and caches of `generate` by itself and of the loop."""
    plain, looped = caches or [LoomCache(plan, model, max_tokens=ROOM) for _ in range(2)]
    expected = tiny.greedy(model, prompt, plain, new, **options)
    set_seed(0)
    return expected, tiny.greedy(model, prompt, looped, new, custom_generate=decode_loop, **options), plain, looped


def assert_same_caches(one: LoomCache, other: LoomCache) -> None:
    assert int(one.get_seq_length()) == int(other.get_seq_length())
    for i, layer in one.packed_layers.items():
        for (_, a), (_, b) in zip(layer.tensors(), other.packed_layers[i].tensors(), strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
            else:
                assert a.equal(b)


@pytest.mark.parametrize(("name", "tokens"), list(zip([*PLANS, *PLANS], [1, 40, 63, 64, 127, 1, 90, 63], strict=True)))
def test_greedy(model, name, tokens):
    expected, actual, plain, looped = both(model, PLANS[name](model), tiny.prompt(tokens, batch=2), new=70)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_families(family, padded):
    """A step without padding has no mask; every family's own code is to bear that."""
    model = tiny.exact(family)
    plan = tiny.eight_bit(model)
    prompt, options = tiny.prompt(70, batch=2), {}
    if padded:
        mask = torch.ones_like(prompt)
        mask[0, :9] = 0
        options["attention_mask"] = mask
    expected, actual, plain, looped = both(model, plan, prompt, new=12, **options)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


@pytest.mark.parametrize("tokens", [5, 23, 24, 60])
def test_sliding_windows(tokens):
    """Prompts shorter and longer than the window of 24 tokens, of which 9 are padding, and two turns."""
    model = tiny.exact("gemma3")
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[0, : min(9, tokens - 1)] = 0
    plan, prompt = tiny.eight_bit(model), tiny.prompt(tokens, batch=2)
    expected, actual, *caches = both(model, plan, prompt, new=40, attention_mask=mask)
    assert actual.equal(expected)
    assert_same_caches(*caches)
    growing = tiny.greedy(model, prompt, LoomCache(plan, model), new=40, attention_mask=mask)
    assert actual.equal(growing)
    more = torch.cat([actual, tiny.prompt(30, batch=2, seed=5)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, more.shape[1] - tokens), value=1)
    expected, actual, *caches = both(model, plan, more, caches=caches, attention_mask=mask)
    assert actual.equal(expected)
    assert_same_caches(*caches)


def test_a_compiled_pass(model, plan, monkeypatch):
    """As on a GPU, where the compiled pass is captured besides."""
    monkeypatch.setattr(_loop, "_compiles", lambda *_: True)
    torch._dynamo.utils.counters.clear()
    expected, actual, plain, looped = both(model, plan, tiny.prompt(57, batch=2), new=12)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


def test_a_pass_is_compiled_for_every_cache(model, plan, monkeypatch):
    """However many there are: torch would run the model as it is after so many."""
    monkeypatch.setattr(_loop, "_compiles", lambda *_: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in range(3):
            cache = LoomCache(plan, model, max_tokens=64 * (n + 1))
            tiny.greedy(model, tiny.prompt(20, batch=2), cache, 4, custom_generate=decode_loop)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_steps_between_pages_and_those_that_fill_one(model, policy, monkeypatch):
    """As on a GPU whose kernels do not pack, where the first kind is captured."""
    plan = tiny.eight_bit(model, window=Window(sinks=4))
    if policy:
        evict = Evict(policy=policy, budget=60)
        entries = tuple(entry.model_copy(update={"evict": evict}) for entry in plan.layers)
        plan = plan.model_copy(update={"layers": entries})
    ran, run, made = [], _step.Step._run, _step.Step.__init__

    def counted(step, cache):
        ran.append(is_between_pages())
        run(step, cache)

    def on_gpu(step, *args):
        made(step, *args)
        step._waits = False

    monkeypatch.setattr(_step.Step, "_run", counted)
    monkeypatch.setattr(_step.Step, "__init__", on_gpu)
    monkeypatch.setattr(_step, "_PLAIN_CALLS", 1 << 30)
    expected, actual, plain, looped = both(model, plan, tiny.prompt(57, batch=2), new=150)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)
    assert (ran.count(True), len(ran)) == (146, 149)


def test_sampling(model, plan):
    options = {"do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 3}
    set_seed(0)
    expected, actual, *_ = both(model, plan, tiny.prompt(60), **options)
    assert actual.equal(expected)


def test_processors(model, plan):
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    expected, actual, *_ = both(model, plan, tiny.prompt(60), **options)
    assert actual.equal(expected)
    assert not actual.equal(both(model, plan, tiny.prompt(60))[0])


@pytest.mark.parametrize("end", [1, 6, 13, 20])
@pytest.mark.parametrize("tokens", [50, 57])
def test_it_ends_where_the_text_ends(model, plan, tokens, end):
    """Whether the last step packs a page or not, no token too many is left in the cache."""
    free = both(model, plan, tiny.prompt(tokens))[0][0, tokens:]
    expected, actual, plain, looped = both(model, plan, tiny.prompt(tokens), eos_token_id=int(free[end]))
    assert actual.equal(expected)
    assert actual.shape[1] <= tokens + end + 1
    assert_same_caches(plain, looped)


def test_sequences_that_end_are_padded(model, plan):
    prompt = tiny.prompt(50, batch=3)
    free = both(model, plan, prompt)[0][:, 50:]
    ends = [int(free[0, 2]), int(free[1, 9])]
    expected, actual, plain, looped = both(model, plan, prompt, eos_token_id=ends, pad_token_id=0)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


class AfterSome(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 70)


def test_stopping_criteria(model, plan):
    expected, actual, plain, looped = both(model, plan, tiny.prompt(60), stopping_criteria=[AfterSome()])
    assert actual.equal(expected)
    assert actual.shape[1] == 70
    assert_same_caches(plain, looped)


def test_steps_are_of_the_device_of_the_tokens(model, plan, monkeypatch):
    """Graphs are of the device that is current, which need not be the model's."""
    chosen, seen = [], []

    @contextmanager
    def device_of(tokens):
        chosen.append(tokens.device)
        yield
        chosen.pop()

    run = _step.Step._run
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(_step.Step, "_run", lambda *args: (seen.append(list(chosen)), run(*args))[1])
    tiny.greedy(model, tiny.prompt(20), LoomCache(plan, model, max_tokens=ROOM), 4, custom_generate=decode_loop)
    assert seen == [[torch.device("cpu")]] * 3
    assert not chosen


@pytest.mark.parametrize(("names", "is_one"), [("cuda:1 cuda:1", True), ("cuda:0 cuda:1", False), ("cpu cpu", False)])
def test_only_what_lies_on_one_gpu_is_replayed(names, is_one):
    assert _step._is_one_gpu(set(map(torch.device, names.split()))) is is_one


def test_left_padding(model, plan):
    prompt, mask = tiny.prompt(90, batch=3), torch.ones(3, 90, dtype=torch.int64)
    mask[1, :30], mask[2, :77] = 0, 0
    expected, actual, plain, looped = both(model, plan, prompt, attention_mask=mask)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)
    assert not actual.equal(both(model, plan, prompt)[1])


def evicting(model):
    evict = Evict(policy="snapkv", budget=100)
    plan = tiny.mixed(model, window=Window(sinks=4, recent=20))
    return plan.model_copy(update={"layers": tuple(it.model_copy(update={"evict": evict}) for it in plan.layers)})


@pytest.mark.parametrize("options", [{}, {"eos_token_id": 5}])
def test_caches_that_evict(model, options):
    plan = evicting(model)
    expected, actual, plain, looped = both(model, plan, tiny.prompt(300, batch=2), new=60, **options)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


def test_prompts_in_chunks(model, plan):
    expected, actual, plain, looped = both(model, plan, tiny.prompt(150), prefill_chunk_size=47)
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


def test_a_second_turn(model, plan):
    first, second, plain, looped = both(model, plan, tiny.prompt(50))
    assert first.equal(second)
    prompt = torch.cat([first, tiny.prompt(30, seed=5)], dim=1)
    expected, actual, *_ = both(model, plan, prompt, caches=(plain, looped))
    assert actual.equal(expected)
    assert_same_caches(plain, looped)


def test_a_cache_is_used_again(model, plan):
    cache = LoomCache(plan, model, max_tokens=ROOM)
    for tokens in (40, 90):
        cache.reset()
        actual = tiny.greedy(model, tiny.prompt(tokens), cache, custom_generate=decode_loop)
        assert actual.equal(tiny.greedy(model, tiny.prompt(tokens), LoomCache(plan, model, max_tokens=ROOM)))


def test_scores_and_logits(model, plan):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.5}
    options |= {"do_sample": True, "top_k": 5}
    set_seed(0)
    expected, actual, _, looped = both(model, plan, tiny.prompt(60), **options)
    assert actual.past_key_values is looped
    assert actual.sequences.equal(expected.sequences)
    for name in ("scores", "logits"):
        assert len(actual[name]) == 24
        torch.testing.assert_close(torch.stack(actual[name]), torch.stack(expected[name]))


def test_a_step_serves_the_tensors_that_it_was_made_for(model, plan):
    """Layers that evict allocate anew for what leaves more tokens to come; others never do."""
    steps = {}
    for name, made in (("packed", plan), ("evicting", evicting(model))):
        cache = LoomCache(made, model, max_tokens=ROOM)
        for tokens in (300, 150, 150):
            cache.reset()
            tiny.greedy(model, tiny.prompt(tokens), cache, new=3, custom_generate=decode_loop)
            steps.setdefault(name, []).append(_step._steps[cache])
    assert steps["packed"][0] is steps["packed"][1] is steps["packed"][2]
    assert steps["evicting"][0] is not steps["evicting"][1] is steps["evicting"][2]


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended += 1


def test_streaming(model, plan):
    heard = Heard()
    free = both(model, plan, tiny.prompt(60))[0][0, 60:]
    end = int(free[15])
    cache = LoomCache(plan, model, max_tokens=ROOM)
    out = tiny.greedy(
        model, tiny.prompt(60), cache, custom_generate=decode_loop, token_streamer=heard, eos_token_id=end
    )
    assert torch.cat([heard.tokens[0][0], *heard.tokens[1:]]).equal(out[0])
    assert heard.ended == 1


def test_which_caches_it_serves(model, plan):
    sliding = tiny.enabled(tiny.build("gemma2"))
    assert serves(LoomCache(plan, model, max_tokens=ROOM))
    assert not serves(LoomCache(plan, model))
    assert serves(LoomCache(tiny.eight_bit(sliding), sliding, max_tokens=ROOM))
    assert not serves(of_other_layers(plan, model))
    assert not serves(DynamicCache(config=model.config))


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_other_caches(model, plan):
    for cache in (LoomCache(plan, model), DynamicCache(config=model.config)):
        with pytest.raises(CacheError, match="cache of fixed size"):
            tiny.greedy(model, tiny.prompt(9), cache, custom_generate=decode_loop)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"output_hidden_states": True}, {"prompt_lookup_num_tokens": 3}])
def test_other_requests(model, plan, option):
    cache = LoomCache(plan, model, max_tokens=ROOM)
    with pytest.raises(ModelError, match=next(iter(option))):
        tiny.greedy(model, tiny.prompt(9), cache, custom_generate=decode_loop, **option)


def of_other_layers(plan, model):
    cache = LoomCache(plan, model, max_tokens=ROOM)
    cache.layers[1] = DynamicLayer()
    return cache


def test_layers_of_other_kinds(model, plan):
    with pytest.raises(ModelError, match="layer 1 of the model has neither full nor sliding-window attention"):
        tiny.greedy(model, tiny.prompt(9), of_other_layers(plan, model), custom_generate=decode_loop)


def test_attention_that_reads_no_pages(model, plan):
    cache = LoomCache(plan, model, max_tokens=ROOM)
    disable(model)
    try:
        with pytest.raises(ModelError, match=r"kvloom\.enable"):
            tiny.greedy(model, tiny.prompt(9), cache, custom_generate=decode_loop)
    finally:
        enable(model)


def test_no_room(model, plan):
    cache = LoomCache(plan, model, max_tokens=64)
    with pytest.raises(CacheError, match="room for 64 tokens and is asked to hold 65"):
        tiny.greedy(model, tiny.prompt(60), cache, new=6, custom_generate=decode_loop)
    assert tiny.greedy(model, tiny.prompt(60), cache, new=5, custom_generate=decode_loop).shape[1] == 65


def test_nothing_new(model, plan):
    cache = LoomCache(plan, model, max_tokens=ROOM)
    tiny.run(model, cache, tiny.prompt(20), [20])
    with pytest.raises(CacheError, match="holds all 20 tokens"):
        tiny.greedy(model, tiny.prompt(20), cache, custom_generate=decode_loop)
