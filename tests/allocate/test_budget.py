from __future__ import annotations

import pytest
from profiles import fingerprint

from kvloom.allocate import Budget, parse_bytes, parse_tokens
from kvloom.errors import PlanError
from kvloom.plan import Plan

MODEL = fingerprint(30)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GiB", 6 * 2**30),
        ("24 GB", 24 * 10**9),
        ("1.5 mib", 3 * 2**19),
        ("512B", 512),
        ("100 kB", 100_000),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["6G", "GiB", "-1 GiB", "6 GiB free", "", "1e9", "six"])
def test_sizes_that_are_none(text):
    with pytest.raises(PlanError, match="number of bytes such as 6GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("128K", 131072), ("2048", 2048), (2048, 2048), ("1m", 2**20), ("1.5K", 1536)],
)
def test_context_lengths(text, tokens):
    assert parse_tokens(text) == tokens


def test_a_context_length_is_no_size():
    with pytest.raises(PlanError, match="number of tokens such as 2048"):
        parse_tokens("128KiB")


def test_bits_count_every_cached_number():
    budget = Budget.bits(16, "2K")
    assert budget.total(MODEL) == 2048 * 30 * 2 * 3 * 64 * 2
    assert Budget.bits(3.5, 2048).total(MODEL) * 16 == budget.total(MODEL) * 3.5


def test_bytes_per_token_count_all_layers_of_one_sequence():
    assert Budget.bytes_per_token(5000.5, 100).total(MODEL) == 500_050


def test_memory_is_everything():
    budget = Budget.memory("6GiB", 4, "128K")
    assert (budget.total(MODEL), budget.batch, budget.tokens) == (6 * 2**30, 4, 131072)


@pytest.mark.parametrize("tokens", [64, 286, 397, 2048, 131072])
@pytest.mark.parametrize("key_bits", [2, 3, 5])
def test_a_plans_own_true_bits_are_a_budget_it_meets_to_the_byte(key_bits, tokens):
    plan = Plan.uniform(MODEL, key_bits=key_bits, value_bits=2)
    budget = Budget.bits(plan.true_bits(tokens), tokens)
    assert budget.total(MODEL) == plan.nbytes(1, tokens)


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("amount", lambda: Budget.bits(0, 2048)),
        ("amount", lambda: Budget.bits(float("nan"), 2048)),
        ("amount", lambda: Budget.bytes_per_token(float("inf"), 2048)),
        ("tokens", lambda: Budget.bits(3, 0)),
        ("batch", lambda: Budget.memory("6GiB", 0, "128K")),
    ],
)
def test_senseless_budgets_name_the_field(field, make):
    with pytest.raises(PlanError, match=rf"budget\.{field} is .*: give a finite number above 0"):
        make()


def test_an_unknown_dtype_is_refused_at_once():
    with pytest.raises(PlanError, match="dtype 'int8' is not known: give one of float16, bfloat16"):
        Budget.bits(3, 2048, dtype="int8")


def test_a_budget_reads_as_a_phrase():
    assert str(Budget.bits(3.5, 2048)) == "3.5 true bits at 2048 tokens"
    assert str(Budget.memory(10**9, 4, 100)) == "1000000000 bytes at 100 tokens, batch 4"
