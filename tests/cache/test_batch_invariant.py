"""`enable(model, batch_invariant=True)`: a token's result, bit for bit, whatever else is in the pass."""

from __future__ import annotations

import pytest
import torch

from kvloom import LoomCache, disable, enable
from kvloom.cache._invariant import ROWS, fix_rows
from kvloom.errors import ModelError
from kvloom.evaluate._through import attention
from tests.cache import tiny

FAMILIES = ("llama", "gemma2", "gemma3", "phi")  # not gpt-oss: its experts are one fused product
CUTS = ([150], [64, 64, 22], [1, 99, 50], [37, 37, 37, 39], [1] * 150)


@pytest.fixture(params=FAMILIES)
def model(request):
    made = tiny.build(request.param)
    enable(made, batch_invariant=True)
    return made


def test_logits_and_codes_do_not_depend_on_the_cuts(model):
    plan, prompt = tiny.mixed(model, prefill="quantized"), tiny.prompt(150)
    results = []
    for chunks in CUTS:
        cache = LoomCache(plan, model)
        logits = tiny.run(model, cache, prompt, chunks)
        token = logits[:, -1:].argmax(-1)
        continued = tiny.greedy(model, torch.cat([prompt, token], 1), cache, new=20)
        results.append((logits, continued, *tiny.codes(cache)))
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(result, results[0], strict=True))


def test_logits_do_not_depend_on_the_batch(model):
    plan, prompts = tiny.mixed(model), tiny.prompt(90, batch=3)
    together = tiny.run(model, LoomCache(plan, model), prompts, [70, *[1] * 20])
    for row in range(3):
        alone = tiny.run(model, LoomCache(plan, model), prompts[row : row + 1], [70, *[1] * 20])
        assert alone.equal(together[row : row + 1])


def test_logits_are_those_of_the_plain_way():
    model = tiny.build("llama")
    enable(model)
    plain = tiny.run(model, LoomCache(tiny.mixed(model), model), tiny.prompt(100), [90, 10])
    enable(model, batch_invariant=True)
    found = tiny.run(model, LoomCache(tiny.mixed(model), model), tiny.prompt(100), [90, 10])
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_it_is_undone():
    model = tiny.build("llama")
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    before = model.config._attn_implementation
    enable(model, batch_invariant=True)
    assert all("forward" in vars(layer) for layer in layers)
    with attention(model, packed=False):
        assert model.config._attn_implementation == before
    assert all("forward" in vars(layer) for layer in layers)
    enable(model)
    assert not any("forward" in vars(layer) for layer in layers)
    enable(model, batch_invariant=True)
    disable(model)
    assert not any("forward" in vars(layer) for layer in layers)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS])
def test_linear_layers_give_their_own_results(rows):
    layer = tiny.build("llama").model.layers[0].mlp.up_proj.double()
    x = torch.randn(2, rows, layer.in_features, dtype=torch.float64)
    wanted = layer(x)
    owner = torch.nn.Sequential(layer)
    fix_rows(owner)
    torch.testing.assert_close(owner(x), wanted, atol=1e-12, rtol=1e-12)


def test_a_cache_of_fixed_size_is_refused():
    model = tiny.build("llama")
    enable(model, batch_invariant=True)
    cache = LoomCache(tiny.mixed(model), model, max_tokens=256)
    with pytest.raises(ModelError, match="max_tokens"):
        tiny.run(model, cache, tiny.prompt(70), [69, 1])
