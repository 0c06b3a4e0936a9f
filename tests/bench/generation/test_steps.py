from __future__ import annotations

from time import sleep

import torch

from kvloom.bench import StepTimes

CPU = torch.device("cpu")


def test_every_decode_step_is_timed_and_no_token_changes(tiny):
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    times = StepTimes(CPU)
    out = tiny.generate(ids, logits_processor=[times], **options)
    assert torch.equal(out, tiny.generate(ids, **options))
    assert len(times.steps()) == out.shape[1] - ids.shape[1] - 1
    assert min(times.first(), *times.steps()) > 0


def test_laps_last_from_mark_to_mark():
    times, scores = StepTimes(CPU), torch.zeros(1, 3)
    for wait in (0.05, 0.001, 0.02):
        sleep(wait)
        assert times(torch.zeros(1, 1), scores) is scores
    assert times.first() >= 0.05
    first, second = times.steps()
    assert first >= 0.001
    assert second >= 0.02
    timing = times.timing([first, second])
    assert timing.method == "wall"
    assert min(first, second) <= timing.seconds <= max(first, second)
