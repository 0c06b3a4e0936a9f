"""On a GPU evaluations replay a graph for every decoded token, with the records of growing caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from kvloom.evaluate import Protocol, drift, fidelity, plan_contestant
from kvloom.evaluate import _steps as steps_module
from kvloom.evaluate._through import Prompt, greedy
from kvloom.plan import Evict, Fingerprint, Plan, TensorSpec, Window

pytestmark = pytest.mark.gpu
PROMPT, TOKENS = 150, 230


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def model(request):
    """In bf16 kernels do all of a step; in fp32 no kernel packs, and steps that fill a page run singly."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to("cuda", request.param).eval()


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


def tolerance(model):
    return 0.05 if model.dtype == torch.bfloat16 else 1e-3


def windows(count):
    return torch.randint(1000, (count, TOKENS), generator=torch.Generator().manual_seed(0))


KINDS = [{}, {"policy": "snapkv", "window": 8}, {"policy": "adakv"}, {"policy": "streaming_llm", "decode": False}]


@pytest.mark.parametrize("kind", KINDS)
def test_fidelity_after_a_prompt(model, made, kind):
    """Splits of the work differ, and with them last digits."""
    protocol, it = Protocol(chunk=1, block=40, unscored=PROMPT, prompt=True), contestant(model, **kind)
    (ours,), (theirs,) = (fidelity(model, windows(3), [x], protocol=protocol, batch=3) for x in (it, growing(it)))
    assert [step._graph is not None for step in made] == [True]
    assert (ours["live_bytes"], ours["true_bits"]) == (theirs["live_bytes"], theirs["true_bits"])
    assert ours["kld"]["value"] == pytest.approx(theirs["kld"]["value"], rel=tolerance(model))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy(model, made, kind):
    it, prompt = contestant(model, **kind), Prompt(model, windows(1)[:, :PROMPT].cuda())
    (ours,), (theirs,) = (greedy(model, x, prompt, 70, frozenset()).tokens for x in (it, growing(it)))
    assert [step._graph is not None for step in made] == [True]
    alike = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 70)
    assert alike > (10 if model.dtype == torch.bfloat16 else 69)


def test_drift(model, made):
    protocol, it = Protocol(chunk=1, block=40, unscored=64), contestant(model)
    (ours,), (theirs,) = (drift(model, windows(1), [x], protocol=protocol) for x in (it, growing(it)))
    assert made[0]._graph is not None
    assert ours["live_bytes"] == theirs["live_bytes"]
    assert ours["kld"] == pytest.approx(theirs["kld"], rel=tolerance(model))


def test_heads_apart_have_kernels_in_bf16_only(model, made):
    spec = TensorSpec(bits=8, grouping="per_channel")
    heads = {layer: ((spec, spec), (spec, spec.model_copy(update={"bits": 4}))) for layer in range(3)}
    plan = Plan.from_head_specs(Fingerprint.of(model), heads)
    it = plan_contestant(plan, model, name="heads", method="x")
    greedy(model, it, Prompt(model, windows(1)[:, :PROMPT].cuda()), 12, frozenset())
    assert len(made) == (model.dtype == torch.bfloat16)
