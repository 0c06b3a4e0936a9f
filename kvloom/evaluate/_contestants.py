"""Contestants: caches that are compared with the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from transformers import DynamicCache

from kvloom._conditions import own_code_hash
from kvloom._ledger import Record
from kvloom.cache import LoomCache, made_by
from kvloom.errors import DataError
from kvloom.evaluate._steps import FEWEST_STEPS, fixed_cache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from kvloom.plan import Plan, Prefill


@dataclass(frozen=True)
class Contestant:
    """A way to hold a model's keys and values.

    Attributes:
        name: in tables and records; unique within a run.
        method: family of the contestant: dense, uniform, kvmix, exact, quanto, hqq.
        target_bits: true bits it was made for, or None.
        make_cache: gives a new empty cache.
        plan: what the cache stores, for a `LoomCache`; None for any other.
        settings: what else makes it differ from others of its method.
        token_multiple: lengths that the cache compresses are multiples of this.
        exact_tail: fewer newest tokens than this stay exact, whatever their number.
        within_pass: how a cache without a plan shows the tokens of one forward pass to each other: exactly, and all
            earlier ones as stored (`chunk-exact`), or as stored (`quantized`).
        stated_bits: true bits of a filled cache whose tensors do not tell them, as they are floats or codes that are
            not packed; None counts the tensors.
        offset: the first chunk of a scored window is longer by so many tokens. Under `prefill="exact"` a plan with
            sinks needs as many, or its pages end inside chunks and more tokens are read exactly than its bits say.
        make_fixed: gives a new empty cache of fixed size for so many tokens of each sequence, that holds and shows what
            `make_cache`'s does; or None where there is none whose steps are quicker.
    """

    name: str
    method: str
    target_bits: float | None
    make_cache: Callable[[], Cache]
    plan: Plan | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    token_multiple: int = 1
    exact_tail: int = 1
    within_pass: Literal["chunk-exact", "quantized"] = "chunk-exact"
    stated_bits: Callable[[Cache], float] | None = None
    offset: int = 0
    make_fixed: Callable[[int], Cache | None] = lambda _: None

    def cache_for(self, tokens: int, steps: int) -> Cache:
        """A new empty cache.

        Args:
            tokens: of each sequence, that there must be room for.
            steps: how many of them come one by one.
        """
        fixed = self.make_fixed(tokens) if steps >= FEWEST_STEPS else None
        return self.make_cache() if fixed is None else fixed

    @property
    def prefill(self) -> str:
        """How the tokens of one forward pass attend to each other.

        A plan says it; the dense cache is `exact`; of other caches `within_pass` says it.
        """
        if self.plan is not None:
            return self.plan.prefill
        return "exact" if self.method == "dense" else self.within_pass

    @property
    def evicts(self) -> bool:
        """Whether tokens leave, which the cache chooses when attention has read a prompt."""
        return self.plan is not None and any(entry.evict for entry in self.plan.layers)

    @property
    def identity(self) -> Record:
        """What its results depend on, in JSON types."""
        plan = self.plan and self.plan.model_dump(mode="json", exclude={"provenance"})
        return {
            "name": self.name,
            "method": self.method,
            "target_bits": self.target_bits,
            "settings": dict(self.settings),
            "offset": self.offset,
            "plan": plan,
        }

    @property
    def conditions(self) -> Record:
        """What its pieces depend on: its identity, and codecs and policies that are not kvloom's.

        Of code without a file they are others each time, so that no piece is met again.
        """
        own_code = own_code_hash(made_by(self.plan) if self.plan else ())
        return {**self.identity, "own_code": own_code or uuid4().hex}

    @property
    def labels(self) -> Record:
        """The fields that every record of this contestant has."""
        return {
            "name": self.name,
            "method": self.method,
            "target_bits": self.target_bits,
            "prefill": self.prefill,
        }


def dense_contestant(model: PreTrainedModel) -> Contestant:
    """The uncompressed cache, as a control: its divergence from itself is zero."""
    return Contestant("dense", "dense", None, lambda: DynamicCache(config=model.config))


def plan_contestant(
    plan: Plan,
    model: PreTrainedModel,
    *,
    name: str,
    method: str,
    target_bits: float | None = None,
    prefill: Prefill | None = None,
) -> Contestant:
    """A `LoomCache` under a plan.

    Args:
        plan: what the cache stores.
        model: the model it serves.
        name: see `Contestant`.
        method: see `Contestant`.
        target_bits: see `Contestant`.
        prefill: in place of the plan's own; scoring uses `quantized`, which gives the scores of
            token-by-token decoding whatever the chunk.
    """
    used = plan if prefill is None else plan.model_copy(update={"prefill": prefill})
    return Contestant(
        name,
        method,
        target_bits,
        lambda: LoomCache(used, model),
        plan=used,
        make_fixed=lambda tokens: fixed_cache(used, model, tokens),
    )


def shared_prefill(plans: Iterable[Plan], wanted: Prefill | None) -> Prefill | None:
    """What prompts attend to where plans are compared: themselves exactly as soon as one plan evicts.

    A policy chooses among tokens that were read exactly, and all plans should read prompts alike.

    Args:
        plans: all that are compared.
        wanted: in place of the plans' own; None keeps theirs.
    """
    evicts = any(entry.evict for plan in plans for entry in plan.layers)
    return "exact" if wanted == "quantized" and evicts else wanted


def plan_method(plan: Plan) -> str:
    """The method that records name for a plan: the solver that made it, or `uniform`."""
    return (plan.provenance and plan.provenance.solver) or "uniform"


def check_names(contestants: Iterable[Contestant]) -> None:
    """Refuse contestants that records could not tell apart.

    Raises:
        DataError: there is none, or two share a name.
    """
    names = [contestant.name for contestant in contestants]
    if not names:
        raise DataError("There are no contestants: give at least one cache to evaluate.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"Two contestants are named {twice[0]!r}: give each its own name.")


def plan_layers(plan: Plan | None) -> list[dict[str, Any]] | None:
    """Bits and formats of each packed layer, as records have them; None without a plan."""
    if plan is None:
        return None
    entries = [(layer, plan.spec(layer)) for layer in plan.model.packed_layers]
    return [
        {
            "layer": layer,
            "key_bits": entry.key.bits,
            "value_bits": entry.value.bits,
            "key": entry.key.label,
            "value": entry.value.label,
        }
        for layer, entry in entries
    ]
