"""On a real model, predicted losses are the KL divergences one measures."""

from __future__ import annotations

from math import log

import torch
from torch.nn.functional import kl_div

from kvloom.assets import CALIBRATION, texts, token_windows
from kvloom.plan import TensorSpec, Window
from kvloom.signals import compute_profile
from kvloom.signals._stored import storage_error
from kvloom.signals._tap import Tap, packed_end, tapped

BITS = (2, 4)
KEYS = [TensorSpec(bits=b, grouping="per_channel", group_size=64) for b in BITS]
VALUES = [TensorSpec(bits=b, grouping="per_token", group_size="head_dim") for b in BITS]
UNITS = [
    ("key", 1, 2),
    ("key", 5, 4),
    ("key", 17, 2),
    ("key", 29, 2),
    ("value", 0, 2),
    ("value", 9, 4),
    ("value", 17, 2),
]
TOKENS = 320
WINDOW = Window(sinks=4)
PAGES = slice(WINDOW.sinks, packed_end(TOKENS - 1, WINDOW, 64))


def _log_probabilities(model, tokens, unit=None) -> torch.Tensor:
    """`[tokens - 1, vocabulary]`, one unit's packed keys or values stored in its format."""

    def store(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = {"key": key, "value": value}
        if unit is not None and layer == unit[1]:
            side, _, bits = unit
            spec = (KEYS if side == "key" else VALUES)[BITS.index(bits)]
            kept[side] = kept[side].clone()
            kept[side][:, :, PAGES] += storage_error(kept[side][:, :, PAGES], spec.format(64))
        return kept["key"], kept["value"]

    with tapped(model, Tap(range(30), WINDOW, 64, store)), torch.no_grad():
        return model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)


def test_predictions_agree_with_measured_divergence(smollm2) -> None:
    model, tokenizer = smollm2
    tokens = token_windows(tokenizer, texts(CALIBRATION), TOKENS, 1, seed=0)
    table = compute_profile(model, tokens, key_specs=KEYS, value_specs=VALUES, window=WINDOW).table
    exact = _log_probabilities(model, tokens)
    predicted, measured = [], []
    for side, layer, bits in UNITS:
        losses = table.key_loss if side == "key" else table.value_loss
        predicted.append(losses[layer][BITS.index(bits)])
        stored = _log_probabilities(model, tokens, (side, layer, bits))
        measured.append(kl_div(stored, exact, reduction="batchmean", log_target=True).item())
    ratios = [log(p / m) for p, m in zip(predicted, measured, strict=True)]
    assert max(map(abs, ratios)) < log(2.5), dict(zip(UNITS, ratios, strict=True))
    assert _spearman(predicted, measured) > 0.85


def _spearman(left: list[float], right: list[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (left, right)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
