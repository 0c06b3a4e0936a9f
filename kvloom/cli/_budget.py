"""Budgets and constraints as commands are told them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli._numbers import amount_option, tokens_option
from kvloom.errors import PlanError

if TYPE_CHECKING:
    from kvloom import Budget
    from kvloom.allocate import Constraints

Tokens = Annotated[int, tokens_option("Context length: 2048, 128K, ...")]
Bits = Annotated[float | None, amount_option("Budget in true bits a number.")]
BytesPerToken = Annotated[float | None, amount_option("Budget of one sequence.")]
Memory = Annotated[str | None, typer.Option(help="Total budget: 6GiB, '24 GB', ...")]


def budget_of(
    bits: float | None,
    bytes_per_token: float | None,
    memory: str | None,
    tokens: int,
    batch: int | None,
    dtype: str | None,
) -> Budget | None:
    """The one budget given, or None.

    Raises:
        PlanError: several were given, or a batch without the memory it shares.
    """
    from kvloom import Budget

    given = [amount for amount in (bits, bytes_per_token, memory) if amount is not None]
    if len(given) > 1:
        raise PlanError("give one budget: --bits, --bytes-per-token or --memory")
    if batch is not None and memory is None:
        raise PlanError("--batch goes with --memory: the other budgets are of one sequence")
    if bits is not None:
        return Budget.bits(bits, tokens, dtype)
    if bytes_per_token is not None:
        return Budget.bytes_per_token(bytes_per_token, tokens, dtype)
    if memory is not None:
        return Budget.memory(memory, 1 if batch is None else batch, tokens, dtype)
    return None


def constraints_of(equal_in: int, pairs: str | None, max_layouts: int | None, protect: list[str] | None) -> Constraints:
    """The side constraints given.

    Raises:
        PlanError: one is senseless.
    """
    from kvloom.allocate import Constraints, parse_pairs, parse_protect

    allowed = None if pairs is None else parse_pairs(pairs)
    return Constraints(equal_in, allowed, max_layouts, parse_protect(protect or ()))
