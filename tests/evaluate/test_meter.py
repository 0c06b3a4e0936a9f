"""The meter of plans, beside the record that it takes its figure from."""

from __future__ import annotations

from kvloom.evaluate import Protocol, fidelity, kld_meter, plan_contestant
from kvloom.plan import Plan
from tests.evaluate.tiny_llama import random_windows, tiny_model

PROTOCOL = Protocol(64, 64, 64)


def test_it_measures_what_a_record_says_whatever_the_plans_prefill():
    model, windows = tiny_model(), random_windows(2, 256)
    told = []
    measure = kld_meter(model, windows, protocol=PROTOCOL, batch=2, progress=lambda *it: told.append(it))
    found = {}
    for bits in (2, 4):
        plan = Plan.uniform(model, bits, bits, prefill="exact")
        own = plan_contestant(plan, model, name="a", method="uniform", prefill="quantized")
        (record,) = fidelity(model, windows, [own], protocol=PROTOCOL, batch=2)
        found[bits] = measure(plan)
        assert found[bits] == record["kld"]
        assert measure(plan.model_copy(update={"prefill": "quantized"})) == record["kld"]
    assert 0 < found[4]["low"] <= found[4]["value"] <= found[4]["high"] < found[2]["value"]
    assert told
