"""On a GPU evaluations replay a graph for every decoded token, with the records of growing caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from kvloom.evaluate import Protocol, drift, fidelity, plan_contestant
from kvloom.evaluate import _steps as steps_module
from kvloom.evaluate._through import Prompt, greedy
from kvloom.plan import Evict, Plan, Window

pytestmark = pytest.mark.gpu
PROMPT, TOKENS = 150, 230


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.fixture
def made(monkeypatch):
    """Every step that was made."""
    steps, real = [], steps_module.step_of

    def step_of(*args, **kwargs):
        steps.append(real(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(steps_module, "step_of", step_of)
    return steps


def contestant(model, policy=None, **parameters):
    plan = Plan.uniform(model, 4, 4, window=Window(sinks=4))
    if policy:
        evict = Evict(policy=policy, budget=80, parameters=parameters)
        entries = tuple(entry.model_copy(update={"evict": evict}) for entry in plan.layers)
        plan = plan.model_copy(update={"layers": entries})
    return plan_contestant(plan, model, name=policy or "plain", method="x")


def growing(contestant):
    return replace(contestant, make_fixed=lambda _: None)


def windows(count):
    return torch.randint(1000, (count, TOKENS), generator=torch.Generator().manual_seed(0))


KINDS = [{}, {"policy": "snapkv", "window": 8}, {"policy": "adakv"}, {"policy": "streaming_llm", "decode": False}]


@pytest.mark.parametrize("kind", KINDS)
def test_fidelity_after_a_prompt(model, made, kind):
    """Splits of the work differ, and with them last digits, in bf16."""
    protocol, it = Protocol(chunk=1, block=40, unscored=PROMPT, prompt=True), contestant(model, **kind)
    (ours,), (theirs,) = (fidelity(model, windows(3), [x], protocol=protocol, batch=3) for x in (it, growing(it)))
    assert [step._graph is not None for step in made] == [True]
    assert made[0]._calls == TOKENS - PROMPT
    assert (ours["live_bytes"], ours["true_bits"]) == (theirs["live_bytes"], theirs["true_bits"])
    assert ours["kld"]["value"] == pytest.approx(theirs["kld"]["value"], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy(model, made, kind):
    it, prompt = contestant(model, **kind), Prompt(model, windows(1)[:, :PROMPT].cuda())
    ours, theirs = (greedy(model, x, prompt, 70, frozenset()).tokens for x in (it, growing(it)))
    assert [step._graph is not None for step in made] == [True]
    alike = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 70)
    assert alike > 10


def test_drift(model, made):
    protocol, it = Protocol(chunk=1, block=40, unscored=64), contestant(model)
    (ours,), (theirs,) = (drift(model, windows(1), [x], protocol=protocol) for x in (it, growing(it)))
    assert made[0]._calls == TOKENS - 1
    assert ours["live_bytes"] == theirs["live_bytes"]
    assert ours["kld"] == pytest.approx(theirs["kld"], rel=0.05)


def test_what_has_no_kernels_grows(model, made):
    single = model.float()
    try:
        greedy(single, contestant(single), Prompt(single, windows(1)[:, :PROMPT].cuda()), 12, frozenset())
    finally:
        model.bfloat16()
    assert made == []
