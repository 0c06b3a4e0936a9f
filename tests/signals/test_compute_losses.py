"""Predicted losses equal their definition, written out slowly and without the tap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvloom import codecs
from kvloom.plan import Fingerprint, TensorSpec, Window
from kvloom.signals import compute_profile, default_specs, rotated_specs
from kvloom.signals._error_gradient import QUERY_BLOCK
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import packed_end
from tests.signals.models import random_tokens, tiny

KEYS = [TensorSpec(bits=b, grouping="per_channel", group_size=32) for b in (2, 6)]
VALUES = [TensorSpec(bits=b, grouping="per_token", group_size="head_dim") for b in (1, 4)]
WINDOW = Window(sinks=3, recent=6)
TOKENS = 150


class _Slow:
    """Every layer's attention by plain autograd, the packed copies of the values as leaves."""

    def __init__(self) -> None:
        self.key: dict[int, Tensor] = {}
        self.value: dict[int, Tensor] = {}
        self.packed_value: dict[int, Tensor] = {}
        self.query: dict[int, Tensor] = {}
        self.output: dict[int, Tensor] = {}

    def weights(self, layer: int, packed_key: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities `[1, heads, queries, tokens]`, and which of them look at packed tokens."""
        query, key = self.query[layer], self.key[layer].repeat_interleave(2, 1)
        near = query @ key.transpose(-1, -2)
        far = query @ packed_key.repeat_interleave(2, 1).transpose(-1, -2)
        at = torch.arange(TOKENS)
        ends = torch.tensor([packed_end(i, WINDOW, 64) for i in range(TOKENS)])
        packed = (at >= WINDOW.sinks) & (at < ends[:, None])
        scores = torch.where(packed, far, near) * 16**-0.5
        return scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1), packed

    def __call__(self, module, query, key, value, mask, **_):
        layer = module.layer_idx
        self.query[layer], self.key[layer], self.value[layer] = query, key, value
        self.packed_value[layer] = value.clone()
        weights, packed = self.weights(layer, key)
        near, far = (x.repeat_interleave(2, 1) for x in (value, self.packed_value[layer]))
        self.output[layer] = (weights * ~packed) @ near + (weights * packed) @ far
        return self.output[layer].transpose(1, 2), None


def _slow_pass(model, tokens) -> tuple[_Slow, list[Tensor], list[Tensor]]:
    """Gradients of the summed loss by attention outputs and packed values, layer by layer."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    slow = _Slow()
    AttentionInterface.register("slow", slow)
    AttentionMaskInterface.register("slow", sdpa_mask)
    model.set_attn_implementation("slow")
    logits = model(tokens[None], use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
    layers = range(len(slow.output))
    wanted = [slow.output[i] for i in layers] + [slow.packed_value[i] for i in layers]
    gradients = torch.autograd.grad(loss, wanted)
    model.set_attn_implementation("sdpa")
    return slow, list(gradients[: len(layers)]), list(gradients[len(layers) :])


def _stored(exact: Tensor, spec: TensorSpec) -> Tensor:
    """Whole pages as read back, the rest as it is."""
    start, end = WINDOW.sinks, packed_end(TOKENS - 1, WINDOW, 64)
    codec, fmt = codecs.get(spec.codec), spec.format(16)
    stored = exact.detach().clone()
    stored[:, :, start:end] = codec.decode(codec.encode(exact[:, :, start:end], fmt), fmt)
    return stored


def test_predicted_losses_equal_their_definition() -> None:
    model, tokens = tiny("llama"), random_tokens(2, TOKENS)
    table = compute_profile(
        model, tokens, key_specs=KEYS, value_specs=VALUES, window=WINDOW, labels="true", batch=2
    ).table
    passes = [_slow_pass(model, prompt) for prompt in tokens]
    for layer in table.layers:
        for column, spec in enumerate(VALUES):
            squares = []
            for slow, _, gradients in passes:
                value = slow.value[layer]
                changes = (gradients[layer] * (_stored(value, spec) - value)).sum(2)  # [1, kv_heads, head_dim]
                squares.append(changes.square().sum() / (2 * (TOKENS - 1)))
            _assert_statistics(squares, table.value_loss[layer][column], table.value_spread[layer][column])
        for column, spec in enumerate(KEYS):
            squares = []
            for slow, gradients, _ in passes:
                weights, _ = slow.weights(layer, _stored(slow.key[layer], spec))
                output = weights @ slow.value[layer].repeat_interleave(2, 1)
                changes = (gradients[layer] * (output - slow.output[layer])).sum((0, 1, 3))  # [queries]
                blocks = torch.stack([block.sum() for block in changes.split(QUERY_BLOCK)])
                squares.append(blocks.square().sum() / (2 * (TOKENS - 1)))
            _assert_statistics(squares, table.key_loss[layer][column], table.key_spread[layer][column])


def _assert_statistics(values: list[Tensor], mean: float, spread: float) -> None:
    expected = torch.stack(values)
    assert mean == pytest.approx(expected.mean().item(), rel=2e-3)
    assert spread == pytest.approx(expected.std(correction=0).item(), rel=2e-2)


def test_passthrough_costs_nothing_and_bits_pay() -> None:
    keys = [TensorSpec(bits=b, grouping="per_channel", group_size=64) for b in (2, 4, 8, 16)]
    values = [TensorSpec(bits=b, grouping="per_token", group_size="head_dim") for b in (2, 4, 8, 16)]
    table = compute_profile(tiny("llama"), random_tokens(2, 200), key_specs=keys, value_specs=values).table
    for losses in (*table.key_loss, *table.value_loss):
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > losses[2] > losses[3] == 0


def test_next_tokens_are_drawn_from_the_model() -> None:
    prompts = Prompts.of(tiny("llama"), torch.zeros(1, 20_000, dtype=torch.long), None, seed=3)
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(1, 20_000, 4)
    drawn = prompts.next_tokens("sampled", probabilities)[0]
    counts = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(counts, probabilities[0, 0], atol=0.015, rtol=0)
    assert counts[1] == 0


def test_losses_depend_on_the_seed_and_on_nothing_else() -> None:
    model, tokens = tiny("llama"), random_tokens(3, 100)

    def losses(**arguments) -> list[float]:
        table = compute_profile(model, tokens, key_specs=KEYS, value_specs=VALUES, **arguments).table
        return [x for row in (*table.key_loss, *table.value_loss) for x in row]

    first = losses(seed=1)
    assert losses(seed=1, batch=3) == pytest.approx(first, rel=1e-3)
    assert losses(seed=2) != pytest.approx(first, rel=1e-2)


def test_default_candidates_fit_the_head_dim() -> None:
    for head_dim in (16, 32, 64, 80, 128):
        for spec in [spec for side in (*default_specs(head_dim), *rotated_specs()) for spec in side]:
            fmt = spec.format(head_dim)
            assert fmt.grouping == "per_channel" or head_dim % fmt.group_size == 0
    assert [len(side) for side in default_specs(64)] == [10, 10]
    assert [len(side) for side in default_specs(32)] == [10, 7]


def test_the_page_is_as_long_as_the_longest_group() -> None:
    keys = [TensorSpec(bits=2, grouping="per_channel", group_size=128)]
    model = tiny("llama")
    assert Fingerprint.of(model).head_dim == 16
    table = compute_profile(model, random_tokens(1, 200), key_specs=keys, value_specs=VALUES).table
    wide = compute_profile(model, random_tokens(1, 200), key_specs=KEYS, value_specs=VALUES).table
    assert 0 < table.value_loss[1][0] < wide.value_loss[1][0]
