"""The room's door: a profile and a budget in, a plan out."""

from __future__ import annotations

from kvloom.allocate._base import Allocator, get
from kvloom.allocate._budget import Budget
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import Profile


def allocate(
    profile: Profile,
    budget: Budget | None,
    *,
    method: str | Allocator = "exact",
    window: Window | None = None,
    prefill: Prefill = "exact",
) -> Plan:
    """Decides what every layer stores.

    Args:
        profile: what was measured about the model.
        budget: the largest cache allowed; None only for methods that take none (`kvmix`).
        method: name of a registered allocator (see `allocators`), or an instance of one.
        window: tokens every layer keeps exactly; by default those the profile was measured with.
        prefill: how a prompt attends, `exact` or `quantized`.

    Returns:
        A plan whose `nbytes(budget.batch, budget.tokens, budget.dtype)` is at most
        `budget.total(profile.model)`.

    Raises:
        PlanError: the method is unknown, or it cannot meet the budget.
    """
    allocator = get(method)() if isinstance(method, str) else method
    return allocator.solve(profile, budget, window=profile.table.window if window is None else window, prefill=prefill)
