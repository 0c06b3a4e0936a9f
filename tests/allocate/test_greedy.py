from __future__ import annotations

import pytest
from profiles import profile
from test_exact import WINDOWS, greedy, specs_of

from kvloom.allocate import Budget, allocate
from kvloom.errors import PlanError

TOKENS = 2048


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("bits", "seed"), [(3.5, 0), (4.7, 1), (6, 2)])
def test_it_is_the_heuristic_written_out(bits, window, seed):
    measured, budget = profile(3, seed=seed), Budget.bits(bits, TOKENS)
    plan = allocate(measured, budget, method="greedy", window=window)
    written_out = measured.table.predicted_loss(greedy(measured, budget, window))
    assert plan.nbytes(1, TOKENS) <= budget.total(measured.model)
    assert plan.provenance.predicted_loss == pytest.approx(written_out, rel=1e-9)


def test_provenance_promises_nothing():
    source = allocate(profile(), Budget.bits(3, TOKENS), method="greedy").provenance
    assert (source.signal, source.solver, source.certificate) == ("error_gradient", "greedy", None)


def test_a_budget_is_needed_and_must_hold_the_cheapest():
    with pytest.raises(PlanError, match="method 'greedy' needs one"):
        allocate(profile(), None, method="greedy")
    with pytest.raises(PlanError, match="raise the budget"):
        allocate(profile(), Budget.bits(0.5, TOKENS), method="greedy")


def test_with_room_for_everything_it_is_the_exact_plan():
    measured = profile()
    plan = allocate(measured, Budget.bits(100, TOKENS), method="greedy")
    assert specs_of(plan) == specs_of(allocate(measured, Budget.bits(100, TOKENS)))
