"""Losses of evictions equal their definition; what is kept is what a cache keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvloom
from kvloom.cache import LoomCache
from kvloom.errors import DataError, PlanError
from kvloom.eviction import Room
from kvloom.plan import Evict, Fingerprint, Plan, Window
from kvloom.signals import EvictionTable, compute_eviction, compute_profile, default_candidates
from kvloom.signals._error_gradient import QUERY_BLOCK
from kvloom.signals._eviction import _DRAWS
from kvloom.signals._kept import kept_of, scores_of
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, tapped
from tests.signals.models import random_tokens, tiny

PROMPT, FOLLOWING = 200, 40
SINKS = Window(sinks=4)
PARAMETERS = {
    "streaming_llm": {"decode": False},
    "h2o": {"recent": 6, "decode": False},
    "snapkv": {"window": 5, "kernel": 3},
    "adakv": {"window": 5, "kernel": 3},
    "key_norm": {},
    "expected_attention": {"window": 40},
    "snap_expected": {"window": 40, "observed": 5},
}


def candidate(policy: str, share: float, **more) -> Evict:
    return Evict(policy=policy, budget=share, parameters=PARAMETERS[policy], **more)


def kept_by_cache(model, tokens: Tensor, evict: Evict, window: Window) -> list[Tensor]:
    """bool `[1, kv_heads, tokens]` of each layer, from the slots of a cache that has read the prompt."""
    plan = Plan.uniform(model, 16, 16, window=window)
    entries = tuple(entry.model_copy(update={"evict": evict}) for entry in plan.layers)
    cache = LoomCache(Plan(model=plan.model, layers=entries), model)
    kvloom.enable(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    kvloom.disable(model)
    found = []
    for layer in cache.layers:
        slots = layer._slots()
        shape = (*slots.shape[:2], tokens.shape[1] + 1)
        found.append(torch.zeros(shape, dtype=torch.bool).scatter(-1, slots + 1, True)[..., 1:])
    return found


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(PARAMETERS)),
    st.floats(0.05, 0.95),
    st.sampled_from([SINKS, Window(sinks=4, recent=20), Window(sinks=5, recent_ratio=0.1)]),
    st.sampled_from([(), ((10, 30),)]),
)
def test_what_is_kept_is_what_a_cache_keeps(policy, share, window, protect):
    model, tokens = tiny("llama"), random_tokens(1, PROMPT)
    evict = candidate(policy, share, protect=protect)
    tap = Tap((0, 1, 2), Window(), 64)
    with torch.no_grad(), tapped(model, tap):
        model(tokens, use_cache=False)
    room = Room(evict.make_policy(), share, protect, window.sinks, window.recent, window.recent_ratio, 64, 0, 1)
    for layer, expected in enumerate(kept_by_cache(model, tokens, evict, window)):
        attention = tap.caught[layer]
        assert torch.equal(kept_of(scores_of(attention, room), room), expected)


class _Slow:
    """Every layer's attention by plain autograd."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.output: dict[int, Tensor] = {}

    def weights(self, layer: int, kept: Tensor | None = None) -> Tensor:
        """Probabilities `[1, heads, tokens, tokens]`; tokens after the prompt see what is kept of it."""
        query, key, _ = self.states[layer]
        at = torch.arange(query.shape[2])
        seen = (at <= at[:, None]).expand(1, query.shape[1], -1, -1).clone()
        if kept is not None:
            seen[:, :, PROMPT:, :PROMPT] &= kept.repeat_interleave(2, 1)[:, :, None]
        scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 16**-0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def read(self, layer: int, kept: Tensor | None = None) -> Tensor:
        return self.weights(layer, kept) @ self.states[layer][2].repeat_interleave(2, 1)

    def __call__(self, module, query, key, value, mask, **_):
        self.states[module.layer_idx] = query, key, value
        self.output[module.layer_idx] = self.read(module.layer_idx)
        return self.output[module.layer_idx].transpose(1, 2), None


def slow_losses(model, tokens: Tensor, evicts: list[Evict], seed: int) -> Tensor:
    """`[layers, candidates]` by definition, for one text `[1, prompt + following]`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    slow = _Slow()
    AttentionInterface.register("slow_evict", slow)
    AttentionMaskInterface.register("slow_evict", sdpa_mask)
    kept = [kept_by_cache(model, tokens[:, :PROMPT], evict, SINKS) for evict in evicts]
    model.set_attn_implementation("slow_evict")
    logits = model(tokens, use_cache=False).logits[0, PROMPT:-1]
    model.set_attn_implementation("sdpa")
    losses = torch.zeros(len(slow.output), len(evicts))
    for draw in range(_DRAWS):
        prompts = Prompts.of(model, tokens[:, PROMPT:], None, seed + draw)
        labels = prompts.next_tokens("sampled", logits.detach().softmax(-1)[None])[0]
        log_p = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(log_p, list(slow.output.values()), retain_graph=True)
        for layer, gradient in enumerate(gradients):
            for n, own in enumerate(kept):
                change = (gradient * (slow.read(layer, own[layer]) - slow.output[layer])).sum((0, 1, 3))[PROMPT:]
                blocks = [block.sum() ** 2 for block in change.split(QUERY_BLOCK)]
                losses[layer, n] += sum(blocks).detach() / (2 * (FOLLOWING - 1) * _DRAWS)
    return losses


def test_losses_equal_their_definition():
    model, tokens = tiny("llama"), random_tokens(2, PROMPT + FOLLOWING)
    evicts = [candidate(policy, share) for policy in ("snapkv", "adakv", "h2o") for share in (0.4, 0.8)]
    table = compute_eviction(model, tokens, candidates=evicts, following=FOLLOWING, seed=3)
    each = torch.stack([slow_losses(model, tokens[n : n + 1], evicts, 3 + n * _DRAWS) for n in range(2)])
    torch.testing.assert_close(torch.tensor(table.loss), each.mean(0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(torch.tensor(table.spread), each.std(0, correction=0), rtol=1e-2, atol=1e-8)
    assert table.prompt == PROMPT
    assert table.candidates == evicts
    assert float(each.min()) > 0


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gpt_oss", "phi3"])
def test_other_families(family):
    model, tokens = tiny(family), random_tokens(1, PROMPT + FOLLOWING)
    model.set_attn_implementation("eager")
    table = compute_eviction(model, tokens, candidates=[candidate("snapkv", 0.4)], following=FOLLOWING)
    assert len(table.loss) == len(Fingerprint.of(model).packed_layers)
    assert all(loss[0] > 0 for loss in table.loss)
    assert model.config._attn_implementation == "eager"


def test_what_keeps_all_loses_nothing():
    model, tokens = tiny("llama"), random_tokens(1, PROMPT + FOLLOWING)
    table = compute_eviction(model, tokens, candidates=[candidate("snapkv", 0.9999)], following=FOLLOWING)
    assert table.loss == [[0.0]] * 3


def test_a_killed_run_goes_on(tmp_path):
    model, tokens, out = tiny("llama"), random_tokens(2, PROMPT + FOLLOWING), tmp_path / "profile.json"
    options = {"candidates": [candidate("snapkv", 0.4)], "following": FOLLOWING, "out": out}
    whole = compute_eviction(model, tokens, **options)
    seen = []
    again = compute_eviction(model, tokens, progress=lambda *report: seen.append(report[:2]), **options)
    assert again == whole  # seconds and all: nothing was measured again
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert compute_eviction(model, tokens, seed=1, **options).loss != whole.loss


def test_the_profile_keeps_the_table(tmp_path):
    model = tiny("llama")
    profile = compute_profile(model, random_tokens(1, 80))
    table = compute_eviction(
        model, random_tokens(1, PROMPT + FOLLOWING), candidates=[candidate("snapkv", 0.4)], following=FOLLOWING
    )
    made = profile.with_eviction(table)
    made.save(tmp_path / "profile.json")
    assert kvloom.Profile.load(tmp_path / "profile.json") == made
    with pytest.raises(DataError, match=r"eviction\.model and eviction\.window"):
        profile.with_eviction(table.model_copy(update={"window": Window(sinks=5)}))


@pytest.mark.parametrize(
    ("evict", "window", "message"),
    [
        (Evict(policy="pyramidkv", budget=0.5), SINKS, "shares out tokens over layers by itself"),
        (Evict(policy="snapkv", budget=64), SINKS, "budget 64 of policy 'snapkv' is no share"),
        (Evict(policy="streaming_llm", budget=0.5), Window(), "set window.sinks to 4"),
    ],
)
def test_candidates_that_do_not_fit(evict, window, message):
    with pytest.raises(PlanError, match=message):
        compute_eviction(
            tiny("llama"), random_tokens(1, PROMPT + FOLLOWING), candidates=[evict], following=FOLLOWING, window=window
        )


def test_texts_that_are_too_short():
    with pytest.raises(DataError, match="texts have 128 tokens, of which 128 follow"):
        compute_eviction(tiny("llama"), random_tokens(1, 128))


def test_default_candidates():
    assert {each.policy for each in default_candidates()} == {"snapkv", "adakv", "expected_attention", "snap_expected"}
    assert all(0 < each.budget < 1 for each in default_candidates(["h2o"]))
    with pytest.raises(PlanError, match="policy 'nobody' is unknown"):
        default_candidates(["nobody"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": [Evict(policy="snapkv", budget=5)]}, "shares of all tokens"),
        ({"candidates": [Evict(policy="snapkv", budget=0.5)] * 2}, "the same eviction twice"),
        ({"loss": [[0.1]]}, "loss must have 3 rows"),
    ],
)
def test_a_table_that_contradicts_itself(changes, message):
    table = compute_eviction(
        tiny("llama"),
        random_tokens(1, PROMPT + FOLLOWING),
        candidates=[candidate("snapkv", 0.4)],
        following=FOLLOWING,
    )
    with pytest.raises(ValueError, match=message):
        EvictionTable(**{**table.model_dump(), **changes})
