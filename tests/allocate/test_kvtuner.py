"""KVTuner's pipeline: pruning and grouping by definition, and what its search promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import channel, profile, token

from kvloom import _extras
from kvloom.allocate import Budget, KVTuner, Objective, StudySettings, allocate
from kvloom.allocate._groups import grouped, pruned
from kvloom.allocate._knapsack import Options
from kvloom.allocate._units import Unit, paired_units, units_of
from kvloom.errors import MissingExtraError, PlanError
from kvloom.plan import Window

pytest.importorskip("optuna", minversion="5")

TOKENS = 2048
BUDGET = Budget.bits(4, TOKENS)
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8)


def bits_of(plan):
    return [(plan.spec(i).key.bits, plan.spec(i).value.bits) for i in plan.model.packed_layers]


def searched(measured, budget=BUDGET, objective=None, **changes):
    kept = {"trials": 40, **changes}
    return allocate(measured, budget, method=KVTuner(objective, StudySettings(**kept)))


@given(POINTS)
def test_pruning_keeps_the_pareto_set(points):
    choices = tuple({"key": channel(b), "value": token(g)} for b, g in itertools.product((2, 4, 8), (2, 4, 8)))
    unit = Unit(3, choices[: len(points)], Options(np.array([c for c, _ in points]), np.array([x for _, x in points])))
    kept = pruned(unit)
    assert kept.layer == 3
    found = list(zip(kept.options.cost, kept.options.loss, strict=True))
    assert found == sorted({p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)})
    for own, point in zip(kept.choices, found, strict=True):
        assert tuple(points[unit.choices.index(own)]) == point


def layer(index, *losses):
    choices = tuple({"key": channel(2 + n), "value": token(2)} for n in range(len(losses)))
    return Unit(index, choices, Options(np.arange(len(losses)), np.array(losses)))


def test_layers_in_a_chain_of_close_losses_are_a_group():
    """The largest losses have mean 1, so that distances are those of e_o."""
    far = layer(3, 1.2, 0.5)
    units = [layer(0, 0.9, 0.1), layer(1, 0.94, 0.1), layer(2, 0.98, 0.1), far, layer(5, 0.98)]
    groups = grouped(units)
    assert [group.layers for group in groups] == [(0, 1, 2), (3,), (5,)]
    assert groups[0].options.loss == pytest.approx([0.9 + 0.94 + 0.98, 0.3])
    assert list(groups[0].options.cost) == [0, 3]
    assert [group.layers for group in grouped([layer(n, 7 * x) for n, x in enumerate((0.9, 0.94, 1.2))])] == [
        (0, 1),
        (2,),
    ]


def dbscan(points, eps, min_samples):
    """Ester et al. 1996 by its definition: clusters are what core points reach; the rest is noise, None."""
    near = [[m for m, other in enumerate(points) if np.linalg.norm(own - other) <= eps] for own in points]
    labels: list[int | None] = [None] * len(points)
    for seed in range(len(points)):
        if labels[seed] is not None or len(near[seed]) < min_samples:
            continue
        waiting = [seed]
        while waiting:
            point = waiting.pop()
            if labels[point] is None:
                labels[point] = seed
                waiting += near[point] if len(near[point]) >= min_samples else []
    return labels


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2)), min_size=2, max_size=12))
def test_groups_are_the_clusters_of_dbscan_and_its_noise_one_by_one(losses):
    units = [layer(n, 1 + top, rest) for n, (top, rest) in enumerate(losses)]
    points = np.array([unit.options.loss for unit in units])
    labels = dbscan(points / points.max(1).mean(), eps=0.05, min_samples=2)
    clusters = {tuple(n for n, own in enumerate(labels) if own == label) for label in set(labels) - {None}}
    noise = {(n,) for n, own in enumerate(labels) if own is None}
    assert {group.layers for group in grouped(units)} == clusters | noise


@settings(max_examples=8)
@given(st.floats(2.6, 8.4), st.integers(0, 3), st.sampled_from(["nsga2", "moead"]))
def test_the_budget_holds_and_layers_have_the_widths(bits, seed, sampler):
    measured, budget = profile(5, seed=seed), Budget.bits(bits, TOKENS)
    plan = searched(measured, budget, sampler=sampler)
    assert plan.nbytes(1, TOKENS) <= budget.total(measured.model)
    assert {width for pair in bits_of(plan) for width in pair} <= {2, 4, 8}
    proof = plan.provenance.certificate
    assert proof["value"] == plan.provenance.predicted_loss
    assert proof["used_bytes"] == plan.nbytes(1, TOKENS)
    assert [n for group in proof["groups"] for n in group] == list(range(5))
    assert allocate(measured, budget).provenance.predicted_loss <= proof["value"]


def test_on_the_surrogate_it_finds_the_best_of_its_groups():
    """It starts there: exact plans of the groups are its first trials."""
    measured = profile(3, keys=[channel(b) for b in (2, 4, 8)], values=[token(b) for b in (2, 4, 8)])
    plan = searched(measured, trials=20)
    groups = grouped([pruned(unit) for unit in paired_units(units_of(measured.table, BUDGET, Window()))])
    totals = [
        (
            sum(g.options.loss[n] for g, n in zip(groups, picks, strict=True)),
            sum(int(g.options.cost[n]) for g, n in zip(groups, picks, strict=True)),
        )
        for picks in itertools.product(*(range(len(group.choices)) for group in groups))
    ]
    best = min(loss for loss, nbytes in totals if nbytes <= BUDGET.total(measured.model))
    assert plan.provenance.predicted_loss == pytest.approx(best)


def test_a_cold_start_is_the_published_one_and_can_miss_the_budget():
    measured = profile(8)
    kept = StudySettings(trials=20, sampler="moead")
    with pytest.raises(PlanError, match=r"none of 20 trials kept to the budget of 2\.7 true bits .* start warm"):
        allocate(measured, Budget.bits(2.7, TOKENS), method=KVTuner(settings=kept, warm=False))
    cold = allocate(measured, Budget.bits(6, TOKENS), method=KVTuner(settings=kept, warm=False))
    warm = allocate(measured, Budget.bits(6, TOKENS), method=KVTuner(settings=kept))
    assert warm.provenance.predicted_loss < cold.provenance.predicted_loss


def test_a_measured_objective_decides():
    """The objective wants many bits in layer 2 and nothing else; the table does not know."""
    measured = profile(3, keys=[channel(b) for b in (2, 4, 8)], values=[token(b) for b in (2, 4, 8)])
    seen = []

    def of(plan):
        seen.append(plan)
        return -float(sum(bits_of(plan)[2]))

    plan = searched(measured, Budget.bits(6, TOKENS), Objective("layer 2", of), trials=150, sampler="moead")
    assert bits_of(plan)[2] == (8, 8)
    assert plan.provenance.certificate["objective"] == "layer 2"
    assert plan.provenance.certificate["value"] == -16
    assert len(seen) == len({tuple(bits_of(it)) for it in seen}) <= 150


def test_the_front_has_no_plan_that_another_beats():
    measured = profile(4)
    plans = KVTuner(settings=StudySettings(trials=60)).front(measured, BUDGET, window=Window(sinks=4))
    points = [(plan.nbytes(1, TOKENS), plan.provenance.predicted_loss) for plan in plans]
    assert len(points) > 3
    assert points == sorted(points)
    assert [loss for _, loss in points] == sorted({loss for _, loss in points}, reverse=True)
    assert plans[0].spec(0).window == Window(sinks=4)


def test_processes_with_another_objective_cannot_join(tmp_path):
    kept = {"trials": 3, "storage": str(tmp_path / "search.log")}
    searched(profile(3), **kept)
    searched(profile(3), **kept)
    for change in ({"objective": Objective("other", lambda plan: 0.0)}, {"budget": Budget.bits(5, TOKENS)}):
        with pytest.raises(PlanError, match="searches something else"):
            searched(profile(3), **change, **kept)


@pytest.mark.parametrize(
    ("keys", "bits", "why"),
    [
        ([channel(3)], 8, r"none of the widths \[2, 4, 8\]"),
        ([channel(1), channel(4)], 2.4, r"the smallest plan of widths \[2, 4, 8\] takes"),
    ],
)
def test_what_it_cannot_do_is_said(keys, bits, why):
    with pytest.raises(PlanError, match=why):
        searched(profile(keys=keys), Budget.bits(bits, TOKENS))


def test_without_optuna_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(_extras, "_found", lambda module: module != "optuna")
    with pytest.raises(MissingExtraError, match="KVTuner's search needs optuna"):
        searched(profile(2))
