from __future__ import annotations

import pytest
from profiles import profile

from kvloom.allocate import Allocator, Exact, allocate, allocators, get, register
from kvloom.allocate import _base as base
from kvloom.errors import PlanError
from kvloom.plan import Plan


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


class Same(Allocator):
    name = "same"

    def solve(self, profile, budget, *, window, prefill):
        return Plan.uniform(profile.model, window=window, prefill=prefill)


def test_methods_are_found_by_name():
    assert allocators() == ("exact", "greedy", "joint", "kvmix", "kvq", "kvtuner")
    assert get("exact") is Exact


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(PlanError, match=r"method 'best' is unknown; choose one of .*exact, greedy, joint, kvmix"):
        allocate(profile(), None, method="best")


def test_a_method_of_ones_own_is_used_by_name(registry):
    register(Same)
    assert "same" in allocators()
    assert allocate(profile(), None, method="same") == Plan.uniform(profile().model)


def test_a_name_is_taken_once(registry):
    register(Same)
    assert register(Same) is Same

    class Other(Same):
        name = "same"

    with pytest.raises(ValueError, match="'same' is taken by Same"):
        register(Other)
