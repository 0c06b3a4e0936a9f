"""A front as a record: its plans are those of the front, format by format."""

from __future__ import annotations

import json

import pytest
from profiles import profile

from kvloom.allocate import ExactFront, front_record
from kvloom.plan import GPUS

TOKENS = 2048


def test_places_and_figures_are_those_of_the_plans():
    front = ExactFront(profile(4), TOKENS, dtype="bfloat16")
    record = front_record(front, "a model", points=12, weights=10**9, reads_at_most=4096)
    assert json.loads(json.dumps(record)) == record
    plans = front.plans(12)
    assert len(record["plans"]) == len(plans)
    for plan, shown in zip(plans, record["plans"], strict=True):
        assert shown["nbytes"] == plan.nbytes(1, TOKENS, "bfloat16") == shown["bytes_per_token"] * TOKENS
        assert shown["true_bits"] == plan.true_bits(TOKENS, "bfloat16")
        assert shown["predicted_loss"] == plan.provenance.predicted_loss
        for row, layer in enumerate(record["layers"]):
            (key,), (value,) = shown["keys"][row], shown["values"][row]
            entry = plan.spec(layer)
            assert record["key_specs"][key] == {"bits": entry.key.bits, "label": entry.key.label}
            assert record["value_specs"][value] == {"bits": entry.value.bits, "label": entry.value.label}
    longest = record["plans"][0]["fits"]["24 GB"]
    room = GPUS["24 GB"] - 10**9
    assert plans[0].nbytes(1, longest, "bfloat16") <= room < plans[0].nbytes(1, longest + 1024, "bfloat16")
    assert record["dense_bytes_per_token"] == 2 * 4 * 3 * 64 * 2


def test_weights_that_do_not_fit_leave_no_context():
    record = front_record(ExactFront(profile(2), TOKENS), "a model", points=3, weights=30 * 10**9)
    assert {plan["fits"]["24 GB"] for plan in record["plans"]} == {0}
    assert all(plan["fits"]["80 GB"] > 0 for plan in record["plans"])


@pytest.mark.parametrize("by_head", [False, True])
def test_heads_are_told_apart_where_they_decide(by_head: bool):
    measured = profile(2)
    table = measured.table
    shares = {
        f"{side}_head_loss": [[[loss * share for loss in row] for share in (0.7, 0.2, 0.1)] for row in losses]
        for side, losses in (("key", table.key_loss), ("value", table.value_loss))
    }
    measured = measured.model_copy(update={"table": table.model_copy(update=shares)})
    record = front_record(ExactFront(measured, TOKENS, by_head=by_head), "a model", points=6)
    assert record["by_head"] is by_head
    assert {len(places) for plan in record["plans"] for places in plan["keys"]} == {3 if by_head else 1}
    assert by_head is any(len(set(places)) > 1 for plan in record["plans"] for places in plan["keys"])
