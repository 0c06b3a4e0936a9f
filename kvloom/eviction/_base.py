"""What a policy is to the rest of the house, and the registry that finds one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kvloom._names import unknown
from kvloom.errors import PlanError

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen

Pooling = Literal["max", "avg"]


class Policy(BaseModel, ABC):
    """Which tokens of a layer are worth keeping. One file a method; its fields are its parameters.

    `kvloom.testing.check_policy` checks what is asked here. Plans are read without torch, so a policy's file does not
    import it.

    Attributes:
        name: What plans call it.
        is_pooled: Whether the KV heads of a layer that have one format compete for one budget, in whole pages, so that
            they keep different numbers of tokens; the scores of all heads are then in one unit.
        sums_attention: Whether `Seen.mass` is to be kept: the attention that every token has received so far.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    is_pooled: ClassVar[bool] = False
    sums_attention: ClassVar[bool] = False

    @property
    def safeguard(self) -> float:
        """Share of its budget that every head keeps, where heads compete."""
        return 0.0

    @property
    def min_sinks(self) -> int:
        """First tokens that the layer's window has to keep exact."""
        return 0

    @property
    def num_queries(self) -> int:
        """Newest queries of a prompt that `scores` looks at."""
        return 0

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether the budget holds while tokens come one by one; otherwise those are all kept."""
        return False

    @property
    def watches_steps(self) -> bool:
        """Whether it has to see what every token that comes alone attends to, not prompts alone."""
        return self.sums_attention or self.evicts_while_decoding

    def newest(self, budget: int) -> int:
        """Newest tokens that are always kept, out of ``budget`` tokens."""
        return 0

    def layer_budget(self, budget: int, layer: int, layers: int, tokens: int, reserved: int) -> int:
        """Tokens that a layer keeps per KV head.

        Args:
            budget: Mean over the layers.
            layer: Number of the layer, among those that are packed.
            layers: How many they are.
            tokens: Tokens seen.
            reserved: Tokens of ``budget`` that every layer keeps in any case.
        """
        return budget

    @abstractmethod
    def scores(self, seen: Seen) -> torch.Tensor:
        """What each token is worth, the larger the better: floating ``[batch, kv_heads, tokens]``.

        A page of tokens is worth their sum. Padding, sinks, protected spans and the newest tokens are seen to by who
        asks. The score of a token follows from its own sequence and, unless heads compete, from its own KV head.
        """


_POLICIES: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Make a policy known by its name, to plans too."""
    _POLICIES[policy.name] = policy
    return policy


@contextmanager
def registered(policy: type[Policy]) -> Iterator[None]:
    """Within the context plans may name ``policy``; afterwards its name means what it did before."""
    previous = _POLICIES.get(policy.name)
    register(policy)
    try:
        yield
    finally:
        if previous is None:
            del _POLICIES[policy.name]
        else:
            register(previous)


def names() -> tuple[str, ...]:
    """Names of the registered policies."""
    return tuple(_POLICIES)


def make(name: str, parameters: Mapping[str, Any]) -> Policy:
    """The policy called ``name`` with these parameters.

    Raises:
        PlanError: No policy has this name, or it does not take the parameters; the message names the field.
    """
    if name not in _POLICIES:
        raise PlanError(unknown("policy", name, sorted(_POLICIES)))
    try:
        return _POLICIES[name].model_validate(dict(parameters))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "its parameters"
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = f"nothing is known by this name: it takes {sorted(_POLICIES[name].model_fields)}"
        raise PlanError(f"policy {name!r}: {field}: {text}.") from None
