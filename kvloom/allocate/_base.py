"""What an allocator is, and the registry that finds it by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from kvloom._names import unknown
from kvloom.allocate._budget import Budget
from kvloom.errors import PlanError
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import Profile

_REGISTRY: dict[str, type[Allocator]] = {}


class Allocator(ABC):
    """Turns what was measured, and a budget, into a plan.

    Subclasses set `name`, decorate themselves with `register`, and can be made without arguments.
    """

    name: ClassVar[str]

    @abstractmethod
    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Makes a plan for the profiled model.

        Args:
            profile: what was measured.
            budget: the largest cache allowed, or None for none.
            window: tokens every layer keeps exactly.
            prefill: how a prompt attends, `exact` or `quantized`.

        Raises:
            PlanError: the budget cannot be met, is missing, or is not one this method can use.
        """


A = TypeVar("A", bound="type[Allocator]")


def register(allocator: A) -> A:
    """Makes a class available to `allocate(..., method=name)`; use it as a decorator.

    Raises:
        ValueError: another class has that name.
    """
    other = _REGISTRY.setdefault(allocator.name, allocator)
    if other is not allocator:
        raise ValueError(f"the allocator name {allocator.name!r} is taken by {other.__qualname__}")
    return allocator


def get(name: str) -> type[Allocator]:
    """The class of that name.

    Raises:
        PlanError: there is none.
    """
    if name not in _REGISTRY:
        raise PlanError(unknown("method", name, allocators()))
    return _REGISTRY[name]


def allocators() -> tuple[str, ...]:
    """Names of the registered methods, sorted."""
    return tuple(sorted(_REGISTRY))
