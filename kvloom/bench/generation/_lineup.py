"""Whose caches are compared: plans, growing and of fixed size, and transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from transformers import DynamicCache, StaticCache

from kvloom._names import unknown
from kvloom.cache import LoomCache
from kvloom.errors import PlanError
from kvloom.evaluate import BEST_AXES, Contestant, Peers, peer_contestants
from kvloom.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEERS = ("dynamic", "static", "quantized")
KINDS = (*PEERS, "growing", "fixed", "loop")
"""Kinds of caches: transformers' `DynamicCache`, `StaticCache` and `QuantizedCache` (quanto's and hqq's 4 and 2 bits
on their best axes), `LoomCache` growing, with ``max_tokens``, and with ``max_tokens`` under `decode_loop`. On a GPU
``generate`` compiles the steps of those of fixed size, and `decode_loop` those of the last."""


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse a kind of cache that is none of `KINDS`.

    Raises:
        PlanError: One is unknown.
    """
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise PlanError(unknown("--caches", strange[0], KINDS))


class Lineup:
    """Contestants by prompt length: caches of fixed size are made for it.

    Args:
        model: The model they serve.
        plans: Plans by name.
        kinds: Which of `KINDS`.

    Attributes:
        notes: A sentence on each kind that does not work here.

    Raises:
        PlanError: A kind is unknown.
        Exception: Whatever `LoomCache` refuses a plan with.
    """

    def __init__(self, model: PreTrainedModel, plans: Mapping[str, Plan], kinds: Sequence[str] = KINDS) -> None:
        check_kinds(kinds)
        for plan in plans.values():
            LoomCache(plan, model)  # refuses what no cache can hold
        self._model, self._plans, self._kinds = model, plans, kinds
        wants_quantized = "quantized" in kinds
        self._quantized = peer_contestants(model, labels=[BEST_AXES]) if wants_quantized else Peers((), ())
        self.notes = self._quantized.notes

    def __call__(self, max_tokens: int) -> list[Contestant]:
        """The contestants, those without a plan first.

        Args:
            max_tokens: Tokens that caches of fixed size have room for.
        """
        config, made = self._model.config, list(self._quantized.contestants)
        if "static" in self._kinds:
            make = partial(StaticCache, config=config, max_cache_len=max_tokens)
            made.insert(0, Contestant("static", "static", None, make))
        if "dynamic" in self._kinds:
            made.insert(0, Contestant("dynamic", "dynamic", None, partial(DynamicCache, config=config)))
        for name, plan in self._plans.items():
            for kind, room in (("growing", None), ("fixed", max_tokens), ("loop", max_tokens)):
                if kind in self._kinds:
                    make_cache = partial(LoomCache, plan, self._model, max_tokens=room)
                    made.append(Contestant(f"{name} {kind}", kind, None, make_cache, plan=plan))
        return made
