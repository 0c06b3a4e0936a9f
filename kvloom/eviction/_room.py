"""How many tokens a layer keeps: arithmetic alone, the same for plans that count bytes and for caches that evict."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from kvloom.errors import PlanError

if TYPE_CHECKING:
    from kvloom.eviction._base import Policy

# Places in a sequence fit in 16 bits up to here.
_SHORT = 2**16
# A ratio of 0.999 settles in fewer.
_ROUNDS = 1 << 16
# A prompt of any length: longer ones do not change what a budget in tokens means.
_LONG = 2**40


def slot_nbytes(tokens: int) -> int:
    """Bytes of the place of a kept token, once ``tokens`` have been seen."""
    return 2 if tokens <= _SHORT else 4


@dataclass(frozen=True)
class Room:
    """What one layer may keep.

    Tokens are chosen one by one before they are packed; a page is encoded once, so what is packed leaves page by page.

    Attributes:
        policy: Which tokens.
        budget: How many per KV head: a number of tokens, or (a float) a share of all tokens seen.
        protect: ``[start, end)`` spans that are never evicted, counted from the first real token.
        sinks: First tokens, exact and never evicted.
        recent: Newest tokens, exact and never evicted.
        recent_ratio: Or the share of the kept tokens that stay exact.
        page_tokens: Tokens in a page.
        layer: Number of the layer among the packed ones.
        layers: How many those are.
    """

    policy: Policy
    budget: int | float
    protect: tuple[tuple[int, int], ...]
    sinks: int
    recent: int
    recent_ratio: float
    page_tokens: int
    layer: int
    layers: int

    def check(self) -> None:
        """Raise PlanError, naming the field, if the budget cannot hold what is never evicted, or sinks are missing."""
        if self.sinks < self.policy.min_sinks:
            raise PlanError(
                f"policy {self.policy.name!r} keeps the first {self.policy.min_sinks} tokens and window.sinks is "
                f"{self.sinks}: set window.sinks to {self.policy.min_sinks}."
            )
        if isinstance(self.budget, int) and self._of_layer(self.budget, _LONG) < self.limit(_LONG):
            raise PlanError(
                f"evict.budget {self.budget} is too small for the tokens that policy {self.policy.name!r} never evicts "
                f"here: give it at least {self._enough(self.budget)} per KV head."
            )

    def limit(self, tokens: int) -> int:
        """Most tokens per KV head, the mean over the heads, once ``tokens`` have been seen.

        A share is rounded up, and at least what is never evicted.
        """
        asked = ceil(round(self.budget * tokens, 6)) if isinstance(self.budget, float) else self.budget
        return self._enough(self._of_layer(self._enough(asked), tokens))

    def _of_layer(self, budget: int, tokens: int) -> int:
        return self.policy.layer_budget(budget, self.layer, self.layers, tokens, self.sinks + self.newest(budget))

    def newest(self, limit: int) -> int:
        """Newest tokens that are never evicted."""
        return max(self.policy.newest(limit), self.recent)

    def exact(self, tokens: int) -> int:
        """Newest of ``tokens`` kept tokens that stay exact."""
        return max(self.recent, ceil(self.recent_ratio * tokens))

    @lru_cache(maxsize=4096)  # noqa: B019 (rooms are few and small)
    def _enough(self, limit: int) -> int:
        """The least limit from ``limit`` on that holds what is never evicted, and the page that leaves next.

        What a limit needs does not fall with it: the least one that is enough is met from below.
        """
        leaving = self.page_tokens if self.policy.evicts_while_decoding else 0
        protected = sum(-(-(end - start) // self.page_tokens) + 1 for start, end in self.protect) * self.page_tokens
        limit, rounds = max(1, limit), 0
        while limit < (need := self.sinks + max(self.newest(limit), self.exact(limit)) + leaving + protected):
            limit, rounds = need, rounds + 1
            if rounds > _ROUNDS:
                raise PlanError(
                    f"no evict.budget holds what is never evicted: the newest tokens of policy {self.policy.name!r} "
                    "and of window.recent_ratio grow with it."
                )
        return limit

    def split(self, tail: int, limit: int, kept: int) -> tuple[int, int]:
        """How the tokens of each KV head are chosen: some of the exact ones first, then units of a page.

        Args:
            tail: Exact tokens there are, sinks left out.
            limit: See `limit`.
            kept: Exact tokens that are never evicted.

        Returns:
            Tokens to take of the exact ones, the best; and units to take besides, which are pages and further exact
            tokens by the ``page_tokens``, best first.
        """
        room = limit - self.sinks
        least = max(kept, self.exact(limit), ceil(self.policy.safeguard * room))
        base = min(tail, least + (room - least) % self.page_tokens)
        return base, (room - base) // self.page_tokens

    @lru_cache(maxsize=4096)  # noqa: B019
    def resident(self, tokens: int, decoded: int) -> int:
        """Tokens held per KV head, the mean over the heads, after one prompt and what followed it.

        Args:
            tokens: Tokens seen.
            decoded: How many of them came one by one after the prompt.
        """
        prompt = tokens - decoded
        held = min(prompt, self.limit(prompt))
        if not self.policy.evicts_while_decoding:
            return held + decoded
        for seen in range(prompt + 1, tokens + 1):
            held += 1
            if held > self.limit(seen):
                held -= self.page_tokens
        return held
