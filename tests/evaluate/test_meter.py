"""The meter of plans, beside the record that it takes its figure from."""

from __future__ import annotations

import torch

import kvloom.evaluate._meter as meter
from kvloom.evaluate import KldMeter, Protocol, fidelity, plan_contestant
from kvloom.plan import Plan
from tests.evaluate.tiny_llama import random_windows, tiny_model

PROTOCOL = Protocol(64, 64, 64)


def test_it_measures_what_a_record_says_whatever_the_plans_prefill():
    model, windows = tiny_model(), random_windows(2, 256)
    told = []
    measure = KldMeter(model, windows, protocol=PROTOCOL, batch=2)
    found = {}
    for bits in (2, 4):
        plan = Plan.uniform(model, bits, bits, prefill="exact")
        own = plan_contestant(plan, model, name="a", method="uniform", prefill="quantized")
        (record,) = fidelity(model, windows, [own], protocol=PROTOCOL, batch=2)
        found[bits] = measure(plan, lambda *it: told.append(it))
        assert found[bits] == record["kld"]
        assert measure(plan.model_copy(update={"prefill": "quantized"})) == record["kld"]
    assert 0 < found[4]["low"] <= found[4]["value"] <= found[4]["high"] < found[2]["value"]
    assert told


def test_the_uncompressed_cache_is_read_once_whatever_number_of_plans(monkeypatch):
    model, windows = tiny_model(), random_windows(3, 256)
    read = []

    def counted(model, rows, protocol):
        read.append(len(rows))
        return dense_logits(model, rows, protocol)

    dense_logits = meter.dense_logits
    monkeypatch.setattr(meter, "dense_logits", counted)
    measure = KldMeter(model, windows, protocol=PROTOCOL, batch=2)
    for bits in (2, 4, 8):
        measure(Plan.uniform(model, bits, bits))
    assert read == [2, 1]


def test_logits_without_room_are_computed_again():
    computed = []

    def compute(rows):
        computed.append(rows.item())
        return torch.full((1, 1, 4), float(rows), dtype=torch.float32)

    logits = meter.KeptLogits(compute, room=2 * 16)
    for row in (1, 2, 3, 1, 2, 3):
        assert logits(torch.tensor([[row]])).unique().item() == row
    assert computed == [1, 2, 3, 3]
