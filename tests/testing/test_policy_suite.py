"""The conformance suite can fail: each check finds the policy that breaks what it checks, in a sentence."""

from __future__ import annotations

import pytest
import torch

from kvloom import eviction, testing
from kvloom.eviction import KeyNorm, Policy, Seen, SnapKV


class Nameless(KeyNorm):
    name = ""


class Greedy(KeyNorm):
    name = "wrong"

    def newest(self, budget: int) -> int:
        return budget + 1


class Crowded(KeyNorm):
    """No budget is large enough for sinks and protected tokens."""

    name = "wrong"

    def newest(self, budget: int) -> int:
        return budget - 4


class Lossy(KeyNorm):
    name = "wrong"

    def layer_budget(self, budget: int, layer: int, layers: int, tokens: int, reserved: int) -> int:
        return budget - layer


class OfTheLast(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        return super().scores(seen)[..., -8:]


class Whole(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.slots


class Undefined(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        return super().scores(seen).sqrt()


class Drawn(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        return torch.rand_like(super().scores(seen))


class InPlace(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        scores = super().scores(seen)
        seen.values.mul_(2)
        return scores


class BatchWide(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        scores = super().scores(seen)
        return scores - scores.mean(0)


class PaddingBlind(KeyNorm):
    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        scores = super().scores(seen)
        return scores - scores.mean(-1, keepdim=True)


class OfThePass(SnapKV):
    """Counts its calls: a prompt in pieces is scored in another order than one in a pass."""

    name = "wrong"

    def scores(self, seen: Seen) -> torch.Tensor:
        calls.append(1)
        return super().scores(seen) * (-1.0) ** len(calls)


calls: list[int] = []


@pytest.mark.parametrize(
    ("policy", "check", "says"),
    [
        (Nameless(), testing.check_counts, "Nameless has no name"),
        (Greedy(), testing.check_counts, "always keeps 201 newest tokens of a budget of 200"),
        (Crowded(), testing.check_counts, "996 newest tokens of a budget of 1000, and a larger budget"),
        (Lossy(), testing.check_counts, "budgets of 7 layers add up to 1379, not 1400"),
        (OfTheLast(), testing.check_scores, r"scores are torch.float32 \[2, 2, 8\], not floating \[2, 2, 300\]"),
        (Whole(), testing.check_scores, "scores are torch.int64"),
        (Undefined(), testing.check_scores, "a score of a real token is NaN"),
        (Drawn(), testing.check_scores, "other scores the second time"),
        (InPlace(), testing.check_scores, "scores changes the keys, values or queries"),
        (BatchWide(), testing.check_sequences_apart, "change with the others of its batch"),
        (PaddingBlind(), testing.check_padding, "change with the padding"),
        (OfThePass(), testing.check_kept, "other tokens stay when the prompt comes in pieces"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Policy) else "",
)
def test_a_wrong_policy_is_found(policy: Policy, check: testing.PolicyCheck, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check(policy)
    check(KeyNorm())
    assert "wrong" not in eviction.names()


@pytest.mark.parametrize("policy", [Greedy(), Whole(), Drawn(), BatchWide()], ids=lambda x: type(x).__name__)
def test_the_whole_suite_finds_it_too(policy: Policy) -> None:
    with pytest.raises(AssertionError, match=r"^wrong: "):
        testing.check_policy(policy)


def test_a_policy_of_ones_own_passes() -> None:
    class Values(KeyNorm):
        name = "values"

        def scores(self, seen: Seen) -> torch.Tensor:
            return seen.values.norm(dim=-1)

    testing.check_policy(Values())
    assert "values" not in eviction.names()
