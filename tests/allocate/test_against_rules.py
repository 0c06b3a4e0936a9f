"""Every rule beside the exact plan, at the rule's own true bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import profile

from kvloom.allocate import KVQ, Budget, KVTuner, StudySettings, allocate

TOKENS = 2048
BITS = st.floats(2.6, 8)


def no_better_than_exact(measured, rule):
    own = rule.nbytes(1, TOKENS)
    plan = allocate(measured, Budget.memory(own, 1, TOKENS))
    assert plan.nbytes(1, TOKENS) <= own
    assert plan.provenance.predicted_loss <= rule.provenance.predicted_loss * (1 + 1e-12)


@given(BITS, st.integers(0, 10**6), st.sampled_from(["greedy", "kvq"]))
def test_greedy_and_kvq_are_no_better(bits, seed, method):
    measured = profile(6, seed=seed)
    no_better_than_exact(measured, allocate(measured, Budget.bits(bits, TOKENS), method=method))


@given(BITS, st.integers(0, 10**6), st.lists(st.floats(0.1, 60), min_size=12, max_size=12))
def test_kvq_is_no_better_whatever_its_norms(bits, seed, norms):
    measured = profile(6, seed=seed)
    no_better_than_exact(measured, allocate(measured, Budget.bits(bits, TOKENS), method=KVQ(norms)))


@given(st.integers(0, 10**6))
def test_kvmix_is_no_better(seed):
    measured = profile(10, seed=seed)
    no_better_than_exact(measured, allocate(measured, None, method="kvmix"))


@settings(max_examples=8)
@given(BITS, st.integers(0, 10**6))
def test_kvtuner_is_no_better(bits, seed):
    pytest.importorskip("optuna", minversion="5")
    measured = profile(6, seed=seed)
    method = KVTuner(settings=StudySettings(trials=25))
    no_better_than_exact(measured, allocate(measured, Budget.bits(bits, TOKENS), method=method))
