"""Made-up losses of evictions: they fall with the share that is kept, and layers differ."""

from __future__ import annotations

import random

from kvloom.plan import Evict, Window
from kvloom.signals import EvictionTable, Profile

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)


def with_evictions(
    profile: Profile, policies: tuple[str, ...] = ("snapkv", "expected_attention"), window: Window | None = None
) -> Profile:
    """The profile with an eviction table of these policies."""
    rng = random.Random(1)
    candidates = [Evict(policy=policy, budget=share) for policy in policies for share in SHARES]
    weights = [rng.lognormvariate(-3, 1) for _ in profile.table.layers]
    loss = [[weight * (1 - each.budget) ** 4 * rng.uniform(0.7, 1.4) for each in candidates] for weight in weights]
    table = profile.table.model_copy(update={"window": window or Window(sinks=4)})
    made = EvictionTable(
        model=profile.model,
        window=table.window,
        prompt=2048,
        candidates=candidates,
        loss=loss,
        spread=[[0.0] * len(candidates) for _ in weights],
        calibration=profile.calibration,
        seconds=2.0,
    )
    return profile.model_copy(update={"table": table}).with_eviction(made)
