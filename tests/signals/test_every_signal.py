"""Every signal equals its formula, written out on plain attention, and pays for no more passes than it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvloom.errors import DataError, ModelError
from kvloom.plan import TensorSpec
from kvloom.signals import LossTable, Profile, compute_profile, get, signals
from tests.signals.models import random_tokens, tiny
from tests.signals.test_compute_losses import KEYS, TOKENS, VALUES, WINDOW, _Slow, _slow_pass, _stored

FORWARD = ("cache_frobenius", "cache_spectral", "output_error", "query_weighted", "score_error", "state_error")
PACKED = slice(3, 131)
SEES = slice(67 + 6, TOKENS)
"""Queries that see a page: its 64 tokens after the sinks, and 6 newer exact ones."""


def profiled(signal: str, prompts: int = 1, **arguments) -> Profile:
    specs = {"key_specs": KEYS, "value_specs": VALUES, "window": WINDOW}
    return compute_profile(tiny("llama"), random_tokens(prompts, TOKENS), signal=signal, **specs, **arguments)


@pytest.fixture(scope="module")
def slow() -> _Slow:
    return _slow_pass(tiny("llama"), random_tokens(1, TOKENS)[0])[0]


def units(table: LossTable):
    """(side, layer, spec, loss, losses of heads or None) of every entry of a table."""
    for row, layer in enumerate(table.layers):
        for side, specs, losses, heads in (
            ("key", table.key_specs, table.key_loss, table.key_head_loss),
            ("value", table.value_specs, table.value_loss, table.value_head_loss),
        ):
            for column, spec in enumerate(specs):
                own = [head[column] for head in heads[row]] if heads else None
                yield side, layer, spec, losses[row][column], own


def states_of(slow: _Slow, side: str, layer: int) -> Tensor:
    return (slow.key if side == "key" else slow.value)[layer].detach()


def error_of(slow: _Slow, side: str, layer: int, spec: TensorSpec) -> Tensor:
    """Of the packed tokens, `[kv_heads, tokens, head_dim]`."""
    states = states_of(slow, side, layer)
    return (_stored(states, spec) - states)[0, :, PACKED]


def output_of(slow: _Slow, side: str, layer: int, spec: TensorSpec | None) -> Tensor:
    """Attention output with one side stored (None: nothing), `[heads, queries, head_dim]`."""
    key, value = slow.key[layer].detach(), slow.value[layer].detach()
    stored = key if side == "value" or spec is None else _stored(key, spec)
    weights, packed = slow.weights(layer, stored)
    near = value.repeat_interleave(2, 1)
    far = near if side == "key" or spec is None else _stored(value, spec).repeat_interleave(2, 1)
    return ((weights * ~packed) @ near + (weights * packed) @ far)[0].detach()


def check(signal: str, slow: _Slow, formula) -> None:
    """Compares with a formula that gives `[kv_heads]`, or a scalar where heads are not told apart."""
    for side, layer, spec, loss, heads in units(profiled(signal).table):
        expected = formula(side, layer, spec)
        assert loss == pytest.approx(expected.sum().item(), rel=2e-3), (side, layer, spec)
        if expected.ndim:
            assert heads == pytest.approx(expected.tolist(), rel=2e-3)
        else:
            assert heads is None


def test_state_error(slow) -> None:
    def formula(side, layer, spec):
        error, exact = error_of(slow, side, layer, spec), states_of(slow, side, layer)[0, :, PACKED]
        return (error.abs().sum(-1) / exact.abs().sum(-1)).mean(-1)

    check("state_error", slow, formula)


def test_score_error(slow) -> None:
    def formula(side, layer, spec):
        if side == "value":
            error, exact = error_of(slow, side, layer, spec), states_of(slow, side, layer)[0, :, PACKED]
            return (error.abs().sum(-1) / exact.abs().sum(-1)).mean(-1)
        key = slow.key[layer].detach()
        moved = slow.weights(layer, _stored(key, spec))[0] - slow.weights(layer, key)[0]
        return moved.detach().abs().sum(-1)[0, :, SEES].unflatten(0, (2, 2)).mean((1, 2))

    check("score_error", slow, formula)


def test_output_error(slow) -> None:
    def formula(side, layer, spec):
        exact, stored = (output_of(slow, side, layer, it)[:, SEES] for it in (None, spec))
        ratios = (stored - exact).abs().sum(-1) / exact.abs().sum(-1)
        return ratios.unflatten(0, (2, 2)).mean((1, 2))

    check("output_error", slow, formula)


def test_query_weighted(slow) -> None:
    model = tiny("llama")

    def formula(side, layer, spec):
        error = error_of(slow, side, layer, spec)
        if side == "key":
            queries = slow.query[layer].detach()[0].unflatten(0, (2, 2)).flatten(1, 2)
            changes = torch.einsum("hqd,htd->hqt", queries, error) / 4  # head_dim ** 0.5
            return changes.square().mean((1, 2))
        weights, packed = slow.weights(layer, slow.key[layer].detach())
        mass = (weights * packed).detach()[0].square().sum(1).unflatten(0, (2, 2)).sum(1)[:, PACKED]
        columns = model.model.layers[layer].self_attn.o_proj.weight.detach().unflatten(1, (4, 16)).transpose(0, 1)

        def read(vectors, head):  # by every query head of a group
            return sum((vectors @ columns[n].T).square().sum(-1) for n in (2 * head, 2 * head + 1))

        outputs = output_of(slow, side, layer, None)[:, SEES]
        energy = sum(read(outputs[n], n // 2).sum() for n in range(4))
        return torch.stack([(mass[head] * read(error[head], head)).sum() / energy for head in range(2)])

    check("query_weighted", slow, formula)


@pytest.mark.parametrize(("name", "order"), [("cache_frobenius", "fro"), ("cache_spectral", 2)])
def test_cache_norms(slow, name: str, order) -> None:
    def formula(side, layer, spec):
        tokens = states_of(slow, side, layer)[0, :, PACKED].transpose(0, 1).flatten(1)
        return torch.linalg.matrix_norm(tokens, order).square() / len(tokens) * 4.0**-spec.bits

    check(name, slow, formula)


@pytest.mark.parametrize(("name", "order"), [("weight_frobenius", "fro"), ("weight_spectral", 2)])
def test_weight_norms(slow, name: str, order) -> None:
    model = tiny("llama")

    def formula(side, layer, spec):
        attention = model.model.layers[layer].self_attn
        weight = (attention.k_proj if side == "key" else attention.v_proj).weight.detach()
        return torch.linalg.matrix_norm(weight, order).square() * 4.0**-spec.bits

    check(name, slow, formula)


def test_weight_norms_of_fused_projections_are_those_of_their_rows() -> None:
    model = tiny("phi3")
    specs = {"key_specs": KEYS, "value_specs": VALUES}
    table = compute_profile(model, random_tokens(1, 80), signal="weight_frobenius", **specs).table
    fused = model.model.layers[1].self_attn.qkv_proj.weight.detach()
    assert table.key_loss[1][0] == pytest.approx(fused[64:96].square().sum().item() * 4.0**-2, rel=1e-4)
    assert table.value_loss[1][1] == pytest.approx(fused[96:].square().sum().item() * 4.0**-4, rel=1e-4)


def test_weights_without_a_matrix_are_refused() -> None:
    model = tiny("llama")
    linear = model.model.layers[1].self_attn.v_proj

    class Bare(torch.nn.Module):
        def forward(self, x):
            return linear(x)

    model.model.layers[1].self_attn.v_proj = Bare()
    with pytest.raises(ModelError, match=r"value projection of layer 1 \(Bare\) has no weight matrix"):
        compute_profile(model, random_tokens(1, 80), signal="weight_spectral")


@pytest.fixture(scope="module")
def gradients() -> dict[str, dict[int, Tensor]]:
    """Gradients of the summed loss by the keys and the values of each layer, by plain autograd."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    model, tokens = tiny("llama"), random_tokens(1, TOKENS)
    slow = _Slow()
    AttentionInterface.register("slow", slow)
    AttentionMaskInterface.register("slow", sdpa_mask)
    model.set_attn_implementation("slow")
    logits = model(tokens, use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    found = torch.autograd.grad(loss, [slow.key[n] for n in range(3)] + [slow.value[n] for n in range(3)])
    return {"key": dict(enumerate(found[:3])), "value": dict(enumerate(found[3:]))}


def test_first_order(slow, gradients) -> None:
    def formula(side, layer, spec):
        parts = gradients[side][layer][0, :, PACKED] * error_of(slow, side, layer, spec)
        return parts.abs().sum((1, 2)) / (TOKENS - 1)

    check("first_order", slow, formula)


def test_fisher(slow, gradients) -> None:
    def formula(side, layer, spec):
        parts = gradients[side][layer][0, :, PACKED] * error_of(slow, side, layer, spec)
        return parts.square().sum((1, 2)) / (2 * (TOKENS - 1))

    check("fisher", slow, formula)


def test_gradient_norm(slow) -> None:
    norms = profiled("gradient_norm").gradient

    def formula(side, layer, spec):
        norm = (norms.key if side == "key" else norms.value)[layer]
        return norm * error_of(slow, side, layer, spec).norm() / states_of(slow, side, layer)[:, :, PACKED].norm()

    check("gradient_norm", slow, formula)


def _kl(side: str, layer: int, spec: TensorSpec, heads: list[int]) -> Tensor:
    """Mean KL divergence of a model whose attention reads some heads' packed states of one layer as stored."""
    model, tokens = tiny("llama"), random_tokens(1, TOKENS)

    class Stored(_Slow):
        def __call__(self, module, query, key, value, mask, **_):
            own = module.layer_idx
            self.query[own], self.key[own] = query, key
            far = {"key": key.clone(), "value": value.clone()}
            if own == layer:
                far[side][:, heads] = _stored(far[side], spec)[:, heads]
            weights, packed = self.weights(own, far["key"])
            near, stored = (x.repeat_interleave(2, 1) for x in (value, far["value"]))
            return ((weights * ~packed) @ near + (weights * packed) @ stored).transpose(1, 2), None

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    exact = model(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    AttentionInterface.register("slow", Stored())
    AttentionMaskInterface.register("slow", sdpa_mask)
    model.set_attn_implementation("slow")
    other = model(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1).mean().detach()


def test_measured_kl(slow) -> None:
    check("measured_kl", slow, lambda side, layer, spec: _kl(side, layer, spec, [0, 1]).float())


def test_measured_kl_by_head(slow) -> None:
    check(
        "measured_kl_by_head",
        slow,
        lambda side, layer, spec: torch.stack([_kl(side, layer, spec, [head]) for head in range(2)]).float(),
    )


def test_heads_of_the_default_signal_share_their_layers_loss() -> None:
    table = profiled("error_gradient", 2).table
    for _, _, _, loss, heads in units(table):
        assert sum(heads) == pytest.approx(loss, rel=1e-6)
        assert min(heads) > 0


@pytest.mark.parametrize("name", signals())
def test_every_signal_falls_with_bits_and_depends_on_no_batch(name: str) -> None:
    one, two = (profiled(name, 2, batch=batch).table for batch in (1, 2))
    for table in (one, two):
        for row in (*table.key_loss, *table.value_loss):
            assert row[0] > row[1] > 0
    for (_, _, _, loss, _), (_, _, _, other, _) in zip(units(one), units(two), strict=True):
        assert loss == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_signals_pay_for_no_backward_pass_and_no_logits(name: str, monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("not needed")

    model = tiny("llama")
    model.lm_head.forward = refuse
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    profile = compute_profile(model, random_tokens(1, 80), key_specs=KEYS, value_specs=VALUES, signal=name)
    assert profile.gradient is None
    with pytest.raises(DataError, match="has no backward pass: leave labels out"):
        compute_profile(model, random_tokens(1, 80), signal=name, labels="true")


def test_weight_norms_pay_for_no_pass_at_all() -> None:
    model = tiny("llama")
    model.model.layers[0].forward = None
    compute_profile(model, random_tokens(1, 80), signal="weight_frobenius")


@pytest.mark.parametrize(("name", "passes"), [("error_gradient", 2), ("fisher", 1), ("gradient_norm", 1)])
def test_passes_do_not_grow_with_the_layers(name: str, passes: int, monkeypatch) -> None:
    """Attention is entered once a layer by the forward pass and once by each backward pass, not once a unit."""
    for layers in (2, 5):
        model, calls = tiny("llama", num_hidden_layers=layers), {"forward": 0, "backward": 0}
        forward, grad = model.forward, torch.autograd.grad

        def counted_forward(*arguments, calls=calls, forward=forward, **named):
            calls["forward"] += 1
            return forward(*arguments, **named)

        def counted_grad(outputs, *arguments, calls=calls, grad=grad, **named):
            calls["backward"] += outputs.shape[-1] == 61  # from the logits
            return grad(outputs, *arguments, **named)

        model.forward = counted_forward
        monkeypatch.setattr(torch.autograd, "grad", counted_grad)
        compute_profile(model, random_tokens(3, 80), key_specs=KEYS, value_specs=VALUES, signal=name)
        monkeypatch.undo()
        assert calls == {"forward": 3, "backward": 3 * passes}


def test_signals_of_padding_are_those_of_the_text() -> None:
    model, tokens = tiny("llama"), random_tokens(1, 150)
    mask = torch.ones_like(tokens)
    plain = compute_profile(model, tokens, signal="fisher", key_specs=KEYS, value_specs=VALUES)
    masked = compute_profile(
        model, tokens, signal="fisher", key_specs=KEYS, value_specs=VALUES, attention_mask=mask, batch=1
    )
    assert masked.table.key_loss[1] == pytest.approx(plain.table.key_loss[1], rel=1e-4)


@pytest.mark.parametrize("name", signals())
def test_zeros_lose_nothing(name: str) -> None:
    model = tiny("llama")
    torch.nn.init.zeros_(model.model.layers[1].self_attn.v_proj.weight)
    table = compute_profile(model, random_tokens(1, TOKENS), signal=name, value_specs=VALUES, window=WINDOW).table
    assert table.value_loss[1] == [0.0] * len(VALUES)
    assert all(loss > 0 for loss in table.value_loss[0])


def test_names_are_sorted_and_found() -> None:
    assert list(signals()) == sorted(signals())
    assert all(get(name).name == name for name in signals())


@pytest.mark.parametrize("signal", ["error_gradient", "measured_kl"])
def test_what_exists_at_a_time_changes_nothing(signal: str, monkeypatch) -> None:
    """Blocks of rows of logits and of alternatives, with padding, of several prompts at once."""
    model, tokens = tiny("llama"), random_tokens(2, TOKENS)
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    specs = {"key_specs": [*KEYS, KEYS[0].model_copy(update={"bits": 3})], "value_specs": VALUES}
    arguments = {"signal": signal, "attention_mask": mask, "batch": 2, "window": WINDOW, **specs}
    whole = compute_profile(model, tokens, **arguments)
    monkeypatch.setattr("kvloom.signals._measure._ROWS", 7)
    monkeypatch.setattr("kvloom.signals._measured_kl._ROWS", 11)
    monkeypatch.setattr("kvloom.signals._replay._ALTERNATIVES", {"cpu": 2})
    parts = compute_profile(model, tokens, **arguments)
    for one, other in zip(units(whole.table), units(parts.table), strict=True):
        assert one[3] == pytest.approx(other[3], rel=1e-4)
    if whole.gradient:
        assert whole.gradient.key == pytest.approx(parts.gradient.key, rel=1e-5)
