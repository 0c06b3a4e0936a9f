"""Steps that fill no page, taken without a look at fill levels: what the growing cache holds and shows."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch
from drawn import EXAMPLES, assert_same, config_of, new_cache, plans
from evicting import AT_PROMPTS_END, evicting, feed, stream, two_turns
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvloom.kernels import between_pages, is_between_pages
from kvloom.kernels._torch import TORCH
from kvloom.plan import Fingerprint, Plan, TensorSpec, Window

KEY, VALUE = TensorSpec(bits=4, grouping="per_channel"), TensorSpec(bits=2, grouping="per_token", group_size=16)


def plan_of(policy=None, budget=100, **parameters):
    plan = Plan.from_specs(Fingerprint.of(config_of(16)), {0: (KEY, VALUE)}, window=Window(sinks=4))
    return evicting(plan, policy, budget, **parameters) if policy else plan


@st.composite
def plans_of_one_layout(draw):
    """A drawn plan whose heads are alike, that may evict when a prompt ends."""
    plan = draw(plans().filter(lambda plan: not plan.pre_rope_layers and not plan.layers[0].heads))
    policy = draw(st.none() | st.sampled_from(AT_PROMPTS_END))
    if policy is None:
        return plan
    once = {"decode": False} if policy == "streaming_llm" else {}
    exact = plan.model_copy(update={"prefill": "exact"})
    return evicting(exact, policy, draw(st.sampled_from([0.1, 0.4, 0.7, 120])), **once)


def steps(cache, tokens, count, start):
    """Attention's outputs, and how many steps filled no page."""
    outputs, alike = [], 0
    for n in range(start, start + count):
        waits = cache.waits_at(n)
        with nullcontext() if waits else between_pages():
            outputs += feed(cache, tokens, [1], n)
        alike += not waits
    return outputs, alike


@EXAMPLES
@given(st.data())
def test_they_hold_and_show_what_the_growing_cache_does(data):
    growing, static, tokens, turns = data.draw(two_turns(data.draw(plans_of_one_layout())))
    for start, turn, count in turns:
        theirs = feed(growing, tokens, [turn] + [1] * count, start)[1:]
        feed(static, tokens, [turn], start)
        ours, _ = steps(static, tokens, count, start + turn)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert_same(static, growing)
    static.check()


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_only_steps_that_fill_a_page_are_others(policy):
    plan = plan_of(policy)
    static, tokens = new_cache(plan, max_tokens=400), stream(plan, 350)
    feed(static, tokens, [200])
    assert steps(static, tokens, 150, 200)[1] == 148
    static.reset()
    feed(static, tokens, [180])
    assert steps(static, tokens, 150, 180)[1] in (147, 148)


def test_a_short_prompt_fills_sinks_first_and_a_full_cache_is_noticed():
    plan = plan_of()
    static, tokens = new_cache(plan, max_tokens=20), stream(plan, 30)
    feed(static, tokens, [2])
    assert [static.waits_at(n) for n in (2, 3, 4, 19, 20)] == [True, True, False, False, True]


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_nothing_of_an_earlier_prompt_is_left(policy):
    """Numbers of slots that hold nothing have weight 0, which NaN would survive."""
    exact = TensorSpec(bits=16, grouping="per_token", group_size=16)
    plan = Plan.from_specs(Fingerprint.of(config_of(16)), {0: (exact, exact)}, window=Window(sinks=4))
    plan = evicting(plan, policy, 250) if policy else plan
    static, bad = new_cache(plan, max_tokens=400), stream(plan, 150)
    bad.value[:, :, 130:] = torch.nan
    feed(static, bad, [150])
    static.reset()
    tokens = stream(plan, 220)
    feed(static, tokens, [200])
    outputs, alike = steps(static, tokens, 20, 200)
    assert alike == 20
    assert all(bool(out.isfinite().all()) for out in outputs)


def test_heads_of_several_layouts_always_wait():
    spec = TensorSpec(bits=8, grouping="per_channel")
    plan = Plan.from_head_specs(Fingerprint.of(config_of(16)), {0: ((KEY, VALUE), (spec, VALUE))})
    static = new_cache(plan, max_tokens=100)
    feed(static, stream(plan, 10), [10])
    assert all(static.waits_at(n) for n in range(10, 100))


class NeverWaits(TorchDispatchMode):
    """Refuses what reads a tensor on the host, and what makes one of numbers that are there."""

    REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.REFUSED, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rotation", [None, "hadamard"])
@pytest.mark.parametrize("policy", [None, "adakv"])
def test_nothing_waits(policy, rotation, monkeypatch):
    specs = [spec.model_copy(update={"rotation": rotation}) for spec in (KEY, VALUE)]
    plan = Plan.from_specs(Fingerprint.of(config_of(16)), {0: tuple(specs)}, window=Window(sinks=4))
    plan = evicting(plan, policy, 100) if policy else plan
    static, tokens = new_cache(plan, max_tokens=400), stream(plan, 210, batch=2)
    feed(static, tokens, [200, 1])
    store, now = static.packed_layers[0].store, slice(201, 202)
    mask = torch.ones(2, 1, 1, 400, dtype=torch.bool)
    options = {"scaling": 0.25, "mask": mask}
    TORCH.attend_static(tokens.query[:, :, now], store, **options)  # fills what is remembered by device

    def step():
        TORCH.append(tokens.key[:, :, now], tokens.value[:, :, now], store)
        TORCH.attend_static(tokens.query[:, :, now], store, **options)

    assert not static.waits_at(201)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("a tensor is read on the host"))
    with between_pages(), NeverWaits():
        step()
    with pytest.raises(pytest.fail.Exception):
        step()


def test_the_mode_ends_with_its_block():
    with suppress(KeyboardInterrupt), between_pages():
        assert is_between_pages()
        raise KeyboardInterrupt
    assert not is_between_pages()
