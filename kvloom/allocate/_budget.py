"""Budgets: how large the cache may get, in whichever unit the user thinks in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvloom._dtypes import dtype_name
from kvloom._sizes import parse_bytes, parse_tokens
from kvloom.errors import PlanError
from kvloom.plan import Fingerprint

Unit = Literal["bits", "bytes_per_token", "bytes"]


@dataclass(frozen=True, slots=True)
class Budget:
    """The largest cache a plan may make: for `batch` sequences of `tokens` tokens each.

    Every byte that is resident counts: codes, scales, the exact window and the page that is not
    full yet. Make one with `bits`, `bytes_per_token` or `memory`.

    Attributes:
        amount: how much, in `unit`.
        unit: `bits` (true bits, 8 x bytes / elements), `bytes_per_token` (of one sequence, all
            packed layers together) or `bytes` (everything).
        tokens: context length at which the budget must hold.
        batch: number of sequences.
        dtype: compute dtype of the tokens kept exactly, such as `float16`; None takes the model's.
    """

    amount: float
    unit: Unit
    tokens: int
    batch: int = 1
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("amount", "tokens", "batch"):
            if not 0 < getattr(self, name) < float("inf"):
                raise PlanError(f"budget.{name} is {getattr(self, name)}: give a finite number above 0")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @classmethod
    def bits(cls, amount: float, tokens: int | str, dtype: str | None = None) -> Budget:
        """At most `amount` true bits for each cached number, at a context of `tokens`."""
        return cls(amount, "bits", parse_tokens(tokens), dtype=dtype)

    @classmethod
    def bytes_per_token(cls, amount: float, tokens: int | str, dtype: str | None = None) -> Budget:
        """At most `amount` bytes for each token of a sequence, at a context of `tokens`."""
        return cls(amount, "bytes_per_token", parse_tokens(tokens), dtype=dtype)

    @classmethod
    def memory(cls, nbytes: int | str, batch: int, tokens: int | str, dtype: str | None = None) -> Budget:
        """At most `nbytes` for `batch` sequences of `tokens` tokens.

        Example: `Budget.memory("6GiB", batch=4, tokens="128K")`.
        """
        return cls(parse_bytes(nbytes), "bytes", parse_tokens(tokens), batch, dtype)

    def total(self, model: Fingerprint) -> int:
        """The budget in bytes for all sequences of `model`, rounded to the nearest byte."""
        if self.unit == "bits":
            return round(self.amount * self._elements(model) / 8)
        if self.unit == "bytes_per_token":
            return round(self.amount * self.batch * self.tokens)
        return int(self.amount)

    def true_bits(self, nbytes: int, model: Fingerprint) -> float:
        """True bits of a cache of `nbytes` at this budget's batch and context."""
        return 8 * nbytes / self._elements(model)

    def _elements(self, model: Fingerprint) -> int:
        per_token = 2 * len(model.packed_layers) * model.num_kv_heads * model.head_dim
        return self.batch * self.tokens * per_token

    def __str__(self) -> str:
        unit = {"bits": "true bits", "bytes_per_token": "bytes per token", "bytes": "bytes"}
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.amount:.12g} {unit[self.unit]} at {self.tokens} tokens{batch}"
