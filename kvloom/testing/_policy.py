"""The suite for an eviction policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kvloom.cache import LoomCache, loom_attention
from kvloom.eviction import Policy, Reading, Seen, received, registered
from kvloom.plan import Evict, Fingerprint, LayerPlan, Plan, TensorSpec, Window
from kvloom.testing._cached import KV_HEADS, QUERY_HEADS, SCALING, tiny_config
from kvloom.testing._samples import states

PolicyCheck = Callable[[Policy], None]
_TOKENS, _PADDING, _SINKS = 300, 40, 8


def check_policy(policy: Policy) -> None:
    """Check everything that kvloom asks of a policy; it need not be registered.

    Raises:
        AssertionError: It is not a good citizen; the message says what is wrong.
    """
    for check in POLICY_CHECKS:
        check(policy)


def check_counts(policy: Policy) -> None:
    """It has a name, a larger budget leaves more room beside the newest tokens, and its layers' budgets add up."""
    if not getattr(policy, "name", ""):
        raise AssertionError(f"{type(policy).__name__} has no name.")
    room = 0
    for budget in (200, 1000):
        newest = policy.newest(budget)
        if not (newest >= 0 and budget - newest > room):
            raise AssertionError(
                f"{policy.name}: it always keeps {newest} newest tokens of a budget of {budget}, and a larger budget "
                "has to leave more room for sinks and protected tokens."
            )
        room = budget - newest
        for layers in (1, 7, 32):
            budgets = [policy.layer_budget(budget, n, layers, 10**6, _SINKS + newest) for n in range(layers)]
            if sum(budgets) != layers * budget:
                raise AssertionError(
                    f"{policy.name}: budgets of {layers} layers add up to {sum(budgets)}, not {layers * budget}."
                )


def check_scores(policy: Policy) -> None:
    """Scores have the tokens' shape, are numbers, and are the same every time."""
    seen = _seen(policy, batch=2)
    before = [x.clone() for x in (seen.keys, seen.values, seen.queries)]
    scores = policy.scores(seen)
    if scores.shape != seen.slots.shape or not scores.is_floating_point():
        raise AssertionError(
            f"{policy.name}: scores are {scores.dtype} {list(scores.shape)}, not floating {list(seen.slots.shape)}."
        )
    if bool(scores[seen.is_real].isnan().any()):
        raise AssertionError(f"{policy.name}: a score of a real token is NaN.")
    if not scores.equal(policy.scores(seen)):
        raise AssertionError(f"{policy.name}: other scores the second time.")
    if not all(a.equal(b) for a, b in zip(before, (seen.keys, seen.values, seen.queries), strict=True)):
        raise AssertionError(f"{policy.name}: scores changes the keys, values or queries it is shown.")


def check_sequences_apart(policy: Policy) -> None:
    """A sequence has the scores it would have alone."""
    seen = _seen(policy, batch=3)
    whole = policy.scores(seen)
    for row in range(3):
        alone = policy.scores(_of_row(seen, slice(row, row + 1)))
        own = seen.is_real[row]
        if not torch.allclose(alone[0][own].double(), whole[row][own].double(), rtol=1e-4, atol=1e-6):
            raise AssertionError(f"{policy.name}: the scores of a sequence change with the others of its batch.")


def check_padding(policy: Policy) -> None:
    """What padding holds does not change the scores of real tokens."""
    seen = _seen(policy, batch=2)
    is_real = seen.is_real[..., None]
    states = seen.keys.where(is_real, 7.0), seen.values.where(is_real, -3.0)
    changed = replace(seen, read=lambda: states)
    if not torch.allclose(
        policy.scores(seen)[seen.is_real].double(), policy.scores(changed)[seen.is_real].double(), rtol=1e-4, atol=1e-6
    ):
        raise AssertionError(f"{policy.name}: the scores of real tokens change with the padding.")


def check_kept(policy: Policy) -> None:
    """In a cache: so many tokens stay as the plan says, in as many bytes, and the same however the prompt arrives."""
    with registered(type(policy)):
        plan = _plan(policy)
        once, pieces = (_filled(plan, chunks) for chunks in ([_TOKENS], [130, 1, 100, _TOKENS - 231]))
    ours, theirs = (dict(cache.packed_layers[0].tensors()) for cache in (once, pieces))
    if ours.keys() != theirs.keys() or not all(ours[name].equal(theirs[name]) for name in ours if "mass" not in name):
        raise AssertionError(f"{policy.name}: other tokens stay when the prompt comes in pieces.")
    if once.nbytes() != plan.nbytes(1, _TOKENS, "float32"):
        raise AssertionError(
            f"{policy.name}: {_TOKENS} tokens leave {once.nbytes()} bytes, and the plan says "
            f"{plan.nbytes(1, _TOKENS, 'float32')}."
        )


POLICY_CHECKS: tuple[PolicyCheck, ...] = (check_counts, check_scores, check_sequences_apart, check_padding, check_kept)
"""Checks of a policy, alone and in a cache."""


def _key_value_query(tokens: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key, value = states(tokens, batch=batch, heads=KV_HEADS), states(tokens, batch=batch, heads=KV_HEADS, seed=1)
    return key, value, states(tokens, batch=batch, heads=QUERY_HEADS, seed=2)


def _seen(policy: Policy, batch: int) -> Seen:
    """A layer at the end of a prompt; every sequence but the first is left-padded."""
    key, value, query = _key_value_query(_TOKENS, batch)
    slots = torch.arange(_TOKENS).expand(batch, KV_HEADS, -1)
    is_real = slots >= _PADDING * (torch.arange(batch) > 0)[:, None, None]
    newest = query[:, :, max(0, _TOKENS - policy.num_queries) :]
    reading = Reading(SCALING)
    mass = received(query, key, slots, is_real, reading) if policy.sums_attention else None
    return Seen(slots, is_real, _TOKENS, newest, reading, lambda: (key, value), mass)


def _of_row(seen: Seen, row: slice) -> Seen:
    key, value = seen.keys[row], seen.values[row]
    mass = None if seen.mass is None else seen.mass[row]
    return Seen(
        seen.slots[row], seen.is_real[row], seen.length, seen.queries[row], seen.reading, lambda: (key, value), mass
    )


def _plan(policy: Policy) -> Plan:
    """One layer of 4 bits that keeps about half of the samples."""
    spec = TensorSpec(bits=4, grouping="per_channel")
    evict = Evict(policy=policy.name, budget=0.6, parameters=policy.model_dump(exclude_defaults=True))
    entry = LayerPlan(layers=0, key=spec, value=spec, window=Window(sinks=_SINKS), evict=evict)
    return Plan(model=Fingerprint.of(tiny_config()), layers=(entry,))


def _filled(plan: Plan, chunks: list[int]) -> LoomCache:
    """A cache of one layer that has read the samples as one prompt."""
    cache = LoomCache(plan, tiny_config())
    cache.expect_prompt(_TOKENS)
    for key, value, query in zip(*(x.split(chunks, dim=2) for x in _key_value_query(_TOKENS, 1)), strict=True):
        handle = cache.update(key, value, 0)[0]
        loom_attention(torch.nn.Module(), query, handle, handle, None, scaling=SCALING)
    return cache
