"""Plans that evict, prompts as keys, values and queries, and ways to feed them to a cache and its attention."""

from __future__ import annotations

from dataclasses import dataclass

import drawn
import torch
from hypothesis import strategies as st

from kvloom.cache import LoomCache, loom_attention
from kvloom.plan import Evict, LayerPlan, Plan

SCALING = 0.05
QUERY_HEADS = 4

# Each with what it takes for small budgets to be allowed.
POLICIES = {
    "streaming_llm": {},
    "h2o": {"recent": 6},
    "snapkv": {"window": 5, "kernel": 3},
    "pyramidkv": {"window": 5, "kernel": 3},
    "adakv": {"window": 5, "kernel": 3},
    "key_norm": {},
    "expected_attention": {"window": 40},
    "snap_expected": {"window": 40, "observed": 5},
}
AT_PROMPTS_END = sorted(set(POLICIES) - {"h2o"})
"""Those that can let tokens go when a prompt ends, and then only."""


def evicting(plan: Plan, policy: str, budget: float, *, protect=(), **parameters) -> Plan:
    """The plan with an evict entry in every layer; sinks where the policy needs them."""
    evict = Evict(policy=policy, budget=budget, protect=protect, parameters={**POLICIES[policy], **parameters})
    entries = [with_evict(entry, evict) for entry in plan.layers]
    return Plan(model=plan.model, layers=tuple(entries), tensors=plan.tensors)


def with_evict(entry: LayerPlan, evict: Evict) -> LayerPlan:
    sinks = max(entry.window.sinks, evict.make_policy().min_sinks)
    window = entry.window.model_copy(update={"sinks": sinks})
    return entry.model_copy(update={"evict": evict, "window": window})


@st.composite
def evicting_plans(draw, policy=None):
    """A drawn plan of one layer that keeps a drawn share of its tokens."""
    plan = draw(drawn.plans(prefill="exact"))
    name = policy or draw(st.sampled_from(sorted(POLICIES)))
    return evicting(plan, name, draw(st.sampled_from([0.1, 0.4, 0.7])))


@dataclass
class Stream:
    """Keys, values and queries of so many tokens, and which of them are padding."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    padding: torch.Tensor

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """Of the queries ``[start, stop)``, by slot, as a model makes it."""
        slots = torch.arange(stop)
        if not bool(self.padding.any()):
            return None
        causal = slots <= slots[start:, None]
        return (causal[None] & (slots >= self.padding[:, None])[:, None])[:, None]


def stream(plan: Plan, tokens: int, *, batch: int = 1, padding=(), seed: int = 0) -> Stream:
    key, value = drawn.states(plan, tokens, batch=batch, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(batch, QUERY_HEADS, tokens, plan.model.head_dim, generator=generator)
    return Stream(key, value, query, torch.tensor([*padding, *[0] * batch])[:batch])


def feed(cache: LoomCache, tokens: Stream, chunks: list[int], start: int = 0) -> list[torch.Tensor]:
    """Append in chunks, each read by attention; what attention gave, ``[batch, queries, heads, head_dim]`` each."""
    outputs = []
    for count in chunks:
        part = slice(start, start + count)
        handle, _ = cache.update(tokens.key[:, :, part], tokens.value[:, :, part], 0)
        query, mask = tokens.query[:, :, part], tokens.mask(start, start + count)
        outputs.append(loom_attention(torch.nn.Module(), query, handle, handle, mask, scaling=SCALING)[0])
        start += count
    return outputs


def kept_slots(cache: LoomCache, row: int, head: int) -> list[int]:
    """Slots that a KV head keeps, sinks first."""
    return [slot for slot in cache.packed_layers[0]._slots()[row, head].tolist() if slot >= 0]


@st.composite
def two_turns(draw, plan: Plan):
    """A growing and a fixed cache of a plan, tokens for both, and two turns: first token, prompt, tokens after it."""
    batch = draw(st.integers(1, 2))
    turns = [draw(st.integers(1, 400)), draw(st.integers(2, 90))]
    decoded = [draw(st.integers(0, 140)) for _ in turns]
    total = sum(turns) + sum(decoded)
    padding = [draw(st.integers(0, min(turns[0] - 1, 39))) for _ in range(batch)]
    tokens = stream(plan, total, batch=batch, padding=padding)
    fixed = drawn.new_cache(plan, max_tokens=total + draw(st.integers(0, 70)))
    starts = (0, turns[0] + decoded[0])
    return drawn.new_cache(plan), fixed, tokens, list(zip(starts, turns, decoded, strict=True))
