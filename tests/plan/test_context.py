"""The longest context that fits, against trying every one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.plan import GPUS, Evict, Fingerprint, Plan, Window, longest_context
from kvloom.plan._context import MOST, STEP

MODEL = Fingerprint(
    architecture="LlamaForCausalLM", num_layers=4, packed_layers=(0, 1, 2, 3), num_kv_heads=2, head_dim=64
)


@given(fixed=st.integers(0, 10**6), slope=st.integers(1, 5000), room=st.integers(0, 10**9))
def test_no_longer_one_fits(fixed: int, slope: int, room: int) -> None:
    found = longest_context(lambda tokens: fixed + slope * tokens, room)
    assert found % STEP == 0
    assert found == 0 or fixed + slope * found <= room
    assert found == MOST or fixed + slope * (found + STEP) > room


@settings(max_examples=20)
@given(bits=st.sampled_from((1, 2, 4, 8)), sinks=st.integers(0, 70), room=st.integers(0, 10**8))
def test_plans_fit_as_far_as_their_bytes_say(bits: int, sinks: int, room: int) -> None:
    plan = Plan.uniform(MODEL, bits, bits, window=Window(sinks=sinks))
    found = longest_context(lambda tokens: plan.nbytes(1, tokens), room)
    assert found == 0 or plan.nbytes(1, found) <= room < plan.nbytes(1, found + STEP)


def test_few_lengths_are_tried() -> None:
    plan, tried = Plan.uniform(MODEL, 4, 2, window=Window(sinks=4)), []

    def nbytes(tokens: int) -> int:
        tried.append(tokens)
        return plan.nbytes(1, tokens)

    longest_context(nbytes, GPUS["24 GB"])
    assert len(tried) < 8


def test_a_cache_that_stops_growing_fits_at_any_length() -> None:
    plan = Plan.uniform(MODEL, 4, 2)
    evict = Evict(policy="streaming_llm", budget=512)
    few = plan.model_copy(update={"layers": (plan.layers[0].model_copy(update={"evict": evict}),)})
    assert longest_context(lambda tokens: few.nbytes(1, tokens), GPUS["24 GB"]) == MOST
