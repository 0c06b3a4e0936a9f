from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from kvloom.bench import Capacity, fit, fit_table, verify
from kvloom.bench.generation._fill import fill_random
from kvloom.bench.generation._fit import cache_nbytes, fit_contestants, step_nbytes
from kvloom.bench.generation._measure import weight_nbytes
from kvloom.errors import DataError, ModelError
from kvloom.evaluate import attention
from kvloom.plan import Evict, Fingerprint, Plan, TensorSpec, Window
from tests.bench.generation.conftest import TINY

MIB = 1 << 20
LLAMA = LlamaConfig(**TINY)
GEMMA = Gemma3TextConfig(
    **{**TINY, "num_hidden_layers": 3},
    sliding_window=24,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
)


def pre_rope(config) -> Plan:
    key = TensorSpec(bits=4, grouping="per_channel", group_size=32, pre_rope=True)
    value = TensorSpec(bits=4, grouping="per_token", group_size="head_dim")
    shape = Fingerprint.of(config)
    return Plan.from_specs(shape, dict.fromkeys(shape.packed_layers, (key, value)))


def plans(config) -> dict[str, Plan]:
    return {
        "k4v2": Plan.uniform(config, 4, 2),
        "windows": Plan.uniform(config, 3, 8, window=Window(sinks=5, recent_ratio=0.2)),
        "pre-rope": pre_rope(config),
        "snapkv": kept(config, "snapkv"),
        "h2o": kept(config, "h2o", recent=10),
    }


def kept(config, policy: str, **parameters) -> Plan:
    plan = Plan.uniform(config, 4, 2, window=Window(sinks=4))
    evict = Evict(policy=policy, budget=0.25, parameters=parameters)
    return plan.model_copy(update={"layers": tuple(x.model_copy(update={"evict": evict}) for x in plan.layers)})


def resident(cache) -> int:
    """Bytes of everything that the cache's layers hold."""
    live = 0
    for layer in cache.layers:
        tensors = [x for x in vars(getattr(layer, "store", layer)).values() if torch.is_tensor(x)]
        live += layer.nbytes() if hasattr(layer, "nbytes") else sum(x.untyped_storage().nbytes() for x in tensors)
    return live


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_live_caches(config, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    named = plans(config)
    if config is GEMMA:
        del named["pre-rope"], named["h2o"]  # growing sliding-window layers keep views of all that a pass gave them
    tokens, batch = 200, 3
    for plan, contestant in zip([None, *named.values()], fit_contestants(model, named, tokens), strict=True):
        with attention(model, packed=plan is not None):
            cache = contestant.make_cache()
            is_fixed_at_prompts_end = plan is not None and plan is named["snapkv"]
            fill_random(cache, model, batch, tokens - 2 * is_fixed_at_prompts_end)
        assert sum(cache_nbytes(plan, config, batch, tokens, dtype)) == resident(cache), contestant.name
    assert weight_nbytes(model) == fit(config, {}, memory=64 * MIB, tokens=9, dtype=dtype, reserve=0).weight_nbytes


@given(st.integers(2, 2000), st.integers(1, 64))
def test_one_more_would_not_fit(tokens: int, mib: int):
    named, reserve = plans(LLAMA), 12345
    capacity = fit(LLAMA, named, memory=mib * MIB, tokens=tokens, dtype=torch.bfloat16, reserve=reserve)
    for row, plan in zip(capacity.fits, [None, *named.values()], strict=True):

        def needed(batch: int, plan: Plan | None = plan) -> int:
            cache = sum(cache_nbytes(plan, LLAMA, batch, tokens, torch.bfloat16)) if batch else 0
            return capacity.weight_nbytes + reserve + batch * step_nbytes(LLAMA, tokens, torch.bfloat16) + cache

        assert needed(row.predicted) <= mib * MIB < needed(row.predicted + 1)
        assert row.verified is None
        assert row.sequence_nbytes == sum(cache_nbytes(plan, LLAMA, 1, tokens, torch.bfloat16))


def test_an_uncompressed_cache_by_hand():
    """Llama-3.1-8B holds 32 layers x 2 x 8 heads x 128 channels x 2 bytes = 128 KiB a token, 4 GiB at 32K."""
    from kvloom.assets import shape_config

    config = shape_config("llama-3.1-8b")
    (row,) = fit(config, {}, memory=80 << 30, tokens=32768, dtype=torch.bfloat16).fits
    assert row.sequence_nbytes == (4 << 30) + 32 * 8  # and a counter a layer
    assert row.true_bits == pytest.approx(16, abs=1e-3)
    assert row.predicted == (80 - 14.96 - 1) // 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1}, "1 tokens: give the tokens of each sequence, 2 at least"),
        ({"tokens": 0}, "0 tokens"),
        ({"memory": 1000}, "the weights take .* bytes and .* are reserved, but there are 1,000"),
    ],
)
def test_mistakes(options: dict, message: str):
    with pytest.raises(DataError, match=message):
        fit(LLAMA, {}, **{"memory": 64 * MIB, "tokens": 100, "dtype": torch.float32, "reserve": 0, **options})


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(ModelError, match="num_layers"):
        fit(LLAMA, {"x": Plan.uniform(LlamaConfig(**{**TINY, "num_hidden_layers": 3}))}, **ENOUGH)


ENOUGH = {"memory": 64 * MIB, "tokens": 100, "dtype": torch.float32, "reserve": 0}


def capacity() -> Capacity:
    return fit(LLAMA, {"k4v2": Plan.uniform(LLAMA, 4, 2)}, **ENOUGH)


def test_without_a_gpu_nothing_is_verified(tiny):
    with pytest.raises(DataError, match="cannot be allocated on cpu"):
        verify(capacity(), tiny, {})


def test_the_table_compares_what_was_verified():
    predicted = capacity()
    table = fit_table(predicted)
    dense, plan = predicted.fits
    assert table.rows[1][3:] == (str(plan.predicted), "-", f"{plan.predicted / dense.predicted:.2f}")
    found = replace(predicted, fits=(replace(dense, verified=10), replace(plan, verified=25)))
    assert fit_table(found).rows[1][3:] == (str(plan.predicted), "25", "2.50")


@pytest.mark.gpu
def test_a_gpu_holds_what_is_predicted():
    from kvloom.assets import SHAPES, random_model
    from kvloom.bench import RESERVE

    device = torch.device("cuda", 0)
    wide = {**TINY, "num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "wide", wide)
        model = random_model("wide", dtype=torch.bfloat16, device=device)
    named = {"k4v2": Plan.uniform(model, 4, 2)}
    found = verify(
        fit(model.config, named, memory=RESERVE + (1 << 30), tokens=4096, dtype=torch.bfloat16), model, named
    )
    for row in found.fits:
        assert row.verified >= 0.95 * row.predicted
