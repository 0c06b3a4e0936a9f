"""The plans that are compared: uniform ones, KVmix's rule, and the exact plan at the bytes of each.

The exact plans keep the first tokens exactly, as the profile says. Uniform plans come both without (as published) and
with the same sinks, so that what the sinks give and what the allocation gives can be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.allocate import Budget, allocate
from kvloom.evaluate import Contestant, plan_contestant
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNIFORM: tuple[tuple[int, int], ...] = ((2, 2), (3, 2), (3, 3), (4, 4), (6, 5))
"""Bits of keys and values that give about 2.5, 3, 3.5, 4.5 and 6 true bits."""

KVMIX = "KVmix rule"
SINKS = " + sinks"

_DTYPE = "bfloat16"
_PAGES = 4096
"""A length of whole pages, at which plans without an exact window have the bits they are named for."""


@dataclass(frozen=True)
class Entry:
    """A plan under comparison; the fields are those of a `Contestant`."""

    name: str
    method: str
    target_bits: float | None
    plan: Plan

    def contestant(self, model: PreTrainedModel, prefill: Prefill) -> Contestant:
        """The plan's cache on a model."""
        return plan_contestant(
            self.plan,
            model,
            name=self.name,
            method=self.method,
            target_bits=self.target_bits,
            prefill=prefill,
        )

    @property
    def file_name(self) -> str:
        """Name of the plan's file."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()) + ".json"


def uniform_name(key_bits: int, value_bits: int) -> str:
    """Name of a uniform plan."""
    return f"uniform K{key_bits}V{value_bits}"


def exact_name(bits: float) -> str:
    """Name of the exact plan at a budget in true bits."""
    return f"exact {bits:.3g}"


def lineup(profile: Profile, tokens: int, uniform: Sequence[tuple[int, int]] = UNIFORM) -> list[Entry]:
    """Plans at equal bytes.

    Every exact plan gets the bytes, at a context of `tokens` and a 16-bit compute dtype, of a plan
    it is compared with: no more. Plans of equal bytes share one.

    Args:
        profile: what was measured of the model.
        tokens: context length at which bytes are equal. A plan with S sinks holds as many exact tokens as one without,
            except while the last page has fewer than S tokens, when it holds a page more: 1,024 + S is a usual length,
            1,024 is not.
        uniform: bits of the keys and values of the uniform plans.
    """
    window = profile.table.window
    entries = [_uniform(profile, *bits) for bits in uniform]
    entries.append(Entry(KVMIX, "kvmix", None, allocate(profile, None, method="kvmix", window=Window())))
    rivals = {entry.plan.nbytes(1, tokens, _DTYPE): nominal_bits(entry.plan) for entry in entries}
    if window != Window():
        entries += [_uniform(profile, *bits, window) for bits in uniform]
    return entries + [_exact(profile, *rival, tokens) for rival in rivals.items()]


def nominal_bits(plan: Plan) -> float:
    """True bits where every page is full: the budget a plan without an exact window stands for."""
    return round(plan.true_bits(_PAGES, _DTYPE), 2)


def _uniform(profile: Profile, key_bits: int, value_bits: int, window: Window | None = None) -> Entry:
    bare = Plan.uniform(profile.model, key_bits, value_bits)
    name, bits = uniform_name(key_bits, value_bits), nominal_bits(bare)
    if window is None:
        return Entry(name, "uniform", bits, bare)
    plan = Plan.uniform(profile.model, key_bits, value_bits, window=window)
    return Entry(name + SINKS, "uniform+sinks", bits, plan)


def _exact(profile: Profile, nbytes: int, bits: float, tokens: int) -> Entry:
    budget = Budget.memory(nbytes, 1, tokens, _DTYPE)
    return Entry(exact_name(bits), "exact", bits, allocate(profile, budget, method="exact"))
