"""How many tokens a layer keeps, and which: against counting one by one and trying every choice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.eviction import H2O, AdaKV, KeyNorm, Room, SnapKV, StreamingLLM, best, choose

PAGE = 64


def room(policy: Any, budget: float, **changes: Any) -> Room:
    fields = {
        "protect": (),
        "sinks": 4,
        "recent": 0,
        "recent_ratio": 0.0,
        "page_tokens": PAGE,
        "layer": 0,
        "layers": 1,
    }
    return Room(policy, budget, **{**fields, **changes})


@given(st.sampled_from([SnapKV(), KeyNorm(), AdaKV()]), st.integers(64, 900), st.integers(1, 2000), st.integers(0, 300))
def test_generated_tokens_are_kept_unless_the_budget_is_a_ceiling(policy, budget, prompt, decoded) -> None:
    assert room(policy, budget).resident(prompt + decoded, decoded) == min(prompt, budget) + decoded


@given(st.integers(200, 900), st.integers(1, 2000), st.integers(0, 700))
def test_the_ceiling_is_hard(budget, prompt, decoded) -> None:
    for policy in (StreamingLLM(), H2O(recent=32)):
        held = room(policy, budget).resident(prompt + decoded, decoded)
        assert min(prompt + decoded, budget - PAGE) < held + 1 <= budget + 1
        assert held <= budget


@given(st.floats(0.01, 0.99), st.integers(1, 3000))
def test_a_share_is_rounded_up_and_holds_what_never_leaves(share, tokens) -> None:
    limit = room(SnapKV(window=32), share, recent=40).limit(tokens)
    assert limit >= share * tokens - 1e-6
    assert limit >= 44
    assert limit < share * tokens + 1 or limit == 44


def test_a_share_is_meant_as_it_is_written() -> None:
    assert room(SnapKV(), 0.07).limit(1000) == 70  # as a float it is a little more
    assert room(SnapKV(), 0.07).limit(1001) == 71


@pytest.mark.parametrize(
    ("policy", "fields", "least"),
    [
        (SnapKV(), {}, 36),
        (SnapKV(), {"recent": 96}, 100),
        (SnapKV(), {"recent_ratio": 0.5}, 36),
        (H2O(), {}, 135),
        (StreamingLLM(), {}, 68),
        (SnapKV(), {"protect": ((0, 64), (70, 75))}, 292),
        (KeyNorm(), {"sinks": 0}, 1),
    ],
)
def test_budgets_that_cannot_hold_what_never_leaves(policy, fields, least) -> None:
    room(policy, least, **fields).check()
    assert room(policy, 1e-9, **fields).limit(1) == least
    if least > 1:
        with pytest.raises(PlanError, match=rf"evict\.budget {least - 1} is too small .* at least {least} per KV head"):
            room(policy, least - 1, **fields).check()


def test_what_no_budget_holds_is_said_at_once() -> None:
    """Plans are read in no time, however much they protect."""
    assert room(SnapKV(), 100, protect=((0, 10**12),)).limit(10**13) > 10**12

    class Greedy(SnapKV):
        def newest(self, budget: int) -> int:
            return budget

    with pytest.raises(PlanError, match=r"no evict\.budget holds what is never evicted"):
        room(Greedy(), 100).check()


def test_missing_sinks_are_named() -> None:
    with pytest.raises(PlanError, match=r"keeps the first 4 tokens and window\.sinks is 3: set window\.sinks to 4"):
        room(StreamingLLM(), 500, sinks=3).check()


@given(st.data())
def test_what_is_split_adds_up(data) -> None:
    policy = data.draw(st.sampled_from([SnapKV(window=8), AdaKV(window=8), H2O(recent=8)]))
    made = room(policy, 0.5, recent=data.draw(st.integers(0, 70)), recent_ratio=0.0)
    limit = made.limit(data.draw(st.integers(1, 2000)))
    tail = data.draw(st.integers(1, 1500))
    kept = min(tail, made.newest(limit))
    base, units = made.split(tail, limit, kept)
    assert kept <= base <= tail
    assert base + units * PAGE <= limit - 4
    if base < tail:
        assert base + units * PAGE == limit - 4
        assert base >= policy.safeguard * (limit - 4)


@given(st.data())
def test_the_choice_is_the_best_that_whole_pages_allow(data) -> None:
    heads, page = data.draw(st.integers(1, 3)), 2
    pages, tail = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7))
    is_pooled = data.draw(st.booleans())
    base = data.draw(st.integers(0, tail))
    units = data.draw(st.integers(0, pages + (tail - base) // page))
    numbers = torch.randperm(100, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double()
    of_pages = numbers[: heads * pages].view(1, heads, pages)
    of_tail = numbers[50 : 50 + heads * tail].view(1, heads, tail)
    chosen = choose(of_pages, of_tail, base, units, page, is_pooled=is_pooled)

    def worth(head: int, kept: tuple[int, ...], blocks: int) -> float:
        best = of_tail[0, head].sort(descending=True).values[: base + page * blocks]
        return float(of_pages[0, head, list(kept)].sum() + best.sum())

    def ways(head: int) -> list[tuple[int, float]]:
        """(units, worth) of every choice of one head."""
        return [
            (n + blocks, worth(head, kept, blocks))
            for n in range(pages + 1)
            for kept in itertools.combinations(range(pages), n)
            for blocks in range((tail - base) // page + 1)
        ]

    ours = [
        (
            int(chosen.pages[0, h].sum()) + (int(chosen.tail[0, h].sum()) - base) // page,
            float(of_pages[0, h][chosen.pages[0, h]].sum() + of_tail[0, h][chosen.tail[0, h]].sum()),
        )
        for h in range(heads)
    ]
    if is_pooled:
        allowed = [c for c in itertools.product(*map(ways, range(heads))) if sum(n for n, _ in c) == units * heads]
        assert sum(n for n, _ in ours) == units * heads
        best = max(sum(w for _, w in choice) for choice in allowed)
        assert sum(w for _, w in ours) == pytest.approx(best)
    else:
        for h in range(heads):
            assert ours[h][0] == units
            assert ours[h][1] == pytest.approx(max(w for n, w in ways(h) if n == units))


def test_pages_that_do_not_exist_are_never_chosen() -> None:
    pages = torch.tensor([[[5.0, torch.nan], [-1e30, torch.nan]]], dtype=torch.float64)
    chosen = choose(pages, torch.zeros(1, 2, 1, dtype=torch.float64), 1, 2, 4, is_pooled=False)
    assert chosen.pages.tolist() == [[[True, False], [True, False]]]
    pooled = choose(pages, torch.zeros(1, 2, 1, dtype=torch.float64), 1, 1, 4, is_pooled=True)
    assert pooled.pages.tolist() == [[[True, False], [True, False]]]


def first_of_equals(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Where the largest scores of every row are, by a stable sort."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(counts):
        chosen[row, scores[row].sort(descending=True, stable=True).indices[:count]] = True
    return chosen


@given(st.data())
def test_of_equals_the_first_ones_stay(data) -> None:
    tokens = data.draw(st.integers(0, 12))
    numbers = st.sampled_from([-1e30, 0.0, 1.0, torch.inf])
    rows = [data.draw(st.lists(numbers, min_size=tokens, max_size=tokens)) for _ in range(2)]
    scores, count = torch.tensor(rows, dtype=torch.float64).view(2, tokens), data.draw(st.integers(0, 14))
    assert best(scores, count).equal(first_of_equals(scores, [count] * 2))
    base = data.draw(st.integers(0, tokens))
    pages = torch.ones(1, 2, data.draw(st.integers(0, 2)), dtype=torch.float64)
    for is_pooled in (False, True):
        chosen = choose(pages, scores[None], base, count // 3, 3, is_pooled=is_pooled)
        counts = chosen.tail[0].sum(-1).tolist()
        assert chosen.tail[0].equal(first_of_equals(scores, counts))
        assert chosen.each in (None, counts[0])
        assert all(kept >= base and (kept - base) % 3 == 0 for kept in counts)
