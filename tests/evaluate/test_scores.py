"""Metrics against their formulas, written out slowly in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom.evaluate._scores import TokenScores, score_tokens


def slow(reference: list[float], logits: list[float], target: int) -> tuple[float, float, float]:
    def distribution(values: list[float]) -> list[float]:
        total = sum(math.exp(v) for v in values)
        return [math.exp(v) / total for v in values]

    p, q = distribution(reference), distribution(logits)
    kld = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return kld, -math.log(q[target]), -math.log(p[target])


def test_scores_equal_the_formulas():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(11, 50, generator=generator) * 3
    logits = reference + torch.randn(11, 50, generator=generator)
    targets = torch.randint(50, (11,), generator=generator)
    scores = score_tokens(reference, logits, targets)
    for i in range(11):
        expected = slow(reference[i].tolist(), logits[i].tolist(), int(targets[i]))
        got = (scores.kld[i], scores.nll[i], scores.dense_nll[i])
        assert [float(value) for value in got] == pytest.approx(expected, rel=1e-6)
        same = int(reference[i].argmax()) == int(logits[i].argmax())
        assert float(scores.top1[i]) == same


def test_a_shift_of_all_logits_is_no_divergence():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * 4
    scores = score_tokens(logits, logits + 32, torch.zeros(5, dtype=torch.int64))
    assert scores.kld.max() < 1e-9
    assert scores.top1.min() == 1


def test_small_divergences_are_resolved():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(2)).double()
    change = torch.zeros(1, 5000).double()
    change[0, logits.argmax()] = 1e-4
    scores = score_tokens(logits, logits + change, torch.tensor([0]))
    p = float(logits.softmax(-1).max())
    second_order = 1e-8 * p * (1 - p) / 2  # KL of a small tilt is half its variance
    assert float(scores.kld) == pytest.approx(second_order, rel=1e-2)


def test_join_keeps_the_order():
    logits = torch.randn(7, 20)
    targets = torch.arange(7)
    whole = score_tokens(logits, logits * 2, targets)
    halves = [score_tokens(logits[i], logits[i] * 2, targets[i]) for i in (slice(3), slice(3, 7))]
    joined = TokenScores.join(halves)
    for name, value in vars(whole).items():
        assert torch.equal(value, getattr(joined, name))
