"""On a GPU `decode_loop` replays a graph: the tokens and caches of `generate`, whose kernels are launched singly."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import kvloom
from kvloom import LoomCache, Plan, decode_loop
from kvloom.generation import _step
from kvloom.plan import Evict, Window

pytestmark = pytest.mark.gpu
ROOM = 640


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    kvloom.enable(made)
    return made


@pytest.fixture(scope="module")
def sliding_model():
    config = transformers.Gemma3TextConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2, sliding_window=100,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.Gemma3ForCausalLM(config).to("cuda", torch.bfloat16).eval()
    kvloom.enable(made)
    return made


@pytest.fixture
def plan(model):
    return Plan.uniform(model, 4, 2, window=Window(sinks=4))


def prompt(tokens, batch=2, seed=0):
    return torch.randint(2, 1000, (batch, tokens), generator=torch.Generator().manual_seed(seed)).cuda()


def run(model, cache, ids, new, **options):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, **{"disable_compile": True, **options})


def graph_of(cache):
    return _step._steps[cache]._graph


def both(model, plan, ids, new=150, **options):
    plain, looped = (LoomCache(plan, model, max_tokens=ROOM) for _ in range(2))
    return (
        run(model, plain, ids, new, **options),
        run(model, looped, ids, new, custom_generate=decode_loop, **options),
        (
            plain,
            looped,
        ),
    )


def assert_same_caches(plain, looped):
    for one, other in zip(plain.packed_layers.values(), looped.packed_layers.values(), strict=True):
        assert all(a.equal(b) for (_, a), (_, b) in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_replayed_steps_are_generates(model, plan, tokens):
    expected, actual, caches = both(model, plan, prompt(tokens))
    assert graph_of(caches[1]) is not None
    assert actual.equal(expected)
    assert_same_caches(*caches)


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_float32_has_no_kernels_and_is_replayed_between_pages(model, plan, policy):
    single = copy.deepcopy(model).float()
    kvloom.enable(single)
    if policy:
        evict = Evict(policy=policy, budget=100)
        entries = tuple(entry.model_copy(update={"evict": evict}) for entry in plan.layers)
        plan = plan.model_copy(update={"layers": entries})
    expected, actual, caches = both(single, plan, prompt(200))
    assert graph_of(caches[1]) is not None
    assert actual.equal(expected)
    assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length())


def test_left_padding(model, plan):
    ids, mask = prompt(200, 3), torch.ones(3, 200, dtype=torch.int64, device="cuda")
    mask[1, :30], mask[2, :177] = 0, 0
    expected, actual, caches = both(model, plan, ids, attention_mask=mask)
    assert actual.equal(expected)
    assert_same_caches(*caches)


@pytest.mark.parametrize("tokens", [1, 99, 200])
def test_rings_of_sliding_windows(sliding_model, tokens):
    """The window of 100 tokens fills up during replayed steps, or before."""
    ids = prompt(tokens)
    mask = torch.ones_like(ids)
    mask[0, : tokens // 3] = 0
    expected, actual, caches = both(sliding_model, Plan.uniform(sliding_model, 8, 8), ids, attention_mask=mask)
    assert graph_of(caches[1]) is not None
    assert actual.equal(expected)
    assert_same_caches(*caches)


@pytest.mark.parametrize("end", [3, 30, 59, 60, 61])
def test_no_token_too_many_is_left(model, plan, end):
    free = both(model, plan, prompt(60, 1))[0][0, 60:]
    expected, actual, caches = both(model, plan, prompt(60, 1), eos_token_id=int(free[end]))
    assert actual.equal(expected)
    assert_same_caches(*caches)


def test_a_graph_serves_the_next_prompt_and_the_next_turn(model, plan):
    cache = LoomCache(plan, model, max_tokens=ROOM)
    run(model, cache, prompt(90), 20, custom_generate=decode_loop)
    graph = graph_of(cache)
    cache.reset()
    first = run(model, cache, prompt(70, seed=1), 20, custom_generate=decode_loop)
    plain = LoomCache(plan, model, max_tokens=ROOM)
    assert first.equal(run(model, plain, prompt(70, seed=1), 20))
    longer = torch.cat([first, prompt(30, seed=2)], dim=1)
    second = run(model, cache, longer, 20, custom_generate=decode_loop)
    assert second.equal(run(model, plain, longer, 20))
    assert graph_of(cache) is graph


@pytest.mark.parametrize("which", ["model", "sliding_model"])
def test_compiled_steps(request, which):
    """Other kernels round otherwise, so that tokens may part where two are nearly as likely."""
    model = request.getfixturevalue(which)
    plan = Plan.uniform(model, 4, 2, window=Window(sinks=4))
    options = {"return_dict_in_generate": True, "output_logits": True}
    plain, looped = (LoomCache(plan, model, max_tokens=ROOM) for _ in range(2))
    expected = run(model, plain, prompt(100), 40, **options)
    torch._dynamo.utils.counters.clear()
    actual = run(model, looped, prompt(100), 40, custom_generate=decode_loop, disable_compile=False, **options)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graph_of(looped) is not None
    alike = int((actual.sequences == expected.sequences).all(0).long().cumprod(0).sum()) - 100
    assert alike > 0
    for ours, theirs in zip(actual.logits[:alike], expected.logits[:alike], strict=True):
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 6e-2
    stores = [cache.packed_layers[min(cache.packed_layers)].store for cache in (plain, looped)]
    slots = stores[0].ring_slots(96, 96 + alike)  # of the tokens that are the same, behind four sinks
    for side in ("key", "value"):
        ours, theirs = (getattr(store.tail, side)[:, :, slots].float() for store in stores)
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_a_model_that_waits_is_told_of_and_still_right(model, plan, monkeypatch):
    real = model.model.forward

    def waiting(*args, **kwargs):
        out = real(*args, **kwargs)
        out.last_hidden_state.sum().item()
        return out

    monkeypatch.setattr(model.model, "forward", waiting)
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph"):
        expected, actual, caches = both(model, plan, prompt(60), new=30)
    assert graph_of(caches[1]) is None
    assert actual.equal(expected)
