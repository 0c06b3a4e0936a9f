"""Measures a model: what its keys and values of every layer matter, from a few prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.errors import DataError
from kvloom.plan import Fingerprint, TensorSpec, Window
from kvloom.signals._base import Labels, Signal, get
from kvloom.signals._error_gradient import ERROR_GRADIENT
from kvloom.signals._gradient_norm import GRADIENT_NORM
from kvloom.signals._measure import Meter
from kvloom.signals._profile import Calibration, GradientNorms, Profile
from kvloom.signals._prompts import Prompts
from kvloom.signals._table import LossTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]
"""`(prompts done, prompts, what is being done)`."""

_LABEL = "reading prompts"
FOUR_SINKS = Window(sinks=4)
"""On SmolLM2-135M four exact first tokens halve the loss of a 2- or 3-bit cache, for 0.03 bits at 2,048 tokens."""


def default_specs(head_dim: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Candidate formats of keys and of values for a model with this head_dim; one kernel launch packs them."""
    bits = (1, 2, 3, 4, 5, 6, 8)
    fine = (2, 3, 4)
    keys = [TensorSpec(bits=b, grouping="per_channel", group_size=64) for b in bits]
    keys += [TensorSpec(bits=b, grouping="per_channel", group_size=32) for b in fine]
    values = [TensorSpec(bits=b, grouping="per_token", group_size="head_dim") for b in bits]
    if head_dim > 32 and head_dim % 32 == 0:
        values += [TensorSpec(bits=b, grouping="per_token", group_size=32) for b in fine]
    return keys, values


def rotated_specs() -> tuple[list[TensorSpec], list[TensorSpec]]:
    """More candidates: rotated, with clip ranges by search; better at 3 bits and below, dearer to pack on a CPU."""
    bits = (1, 2, 3, 4, 5, 6)
    kind = {"rotation": "hadamard", "codec": "clipped"}
    keys = [TensorSpec(bits=b, grouping="per_channel", group_size=64, **kind) for b in bits]
    values = [TensorSpec(bits=b, grouping="per_token", group_size="head_dim", **kind) for b in bits]
    return keys, values


def compute_profile(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    key_specs: Sequence[TensorSpec] | None = None,
    value_specs: Sequence[TensorSpec] | None = None,
    window: Window = FOUR_SINKS,
    labels: Labels = "sampled",
    batch: int = 1,
    attention_mask: Tensor | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
    signal: str = ERROR_GRADIENT.name,
    progress: Progress | None = None,
) -> Profile:
    """Measures how much every layer's keys and values matter.

    A prompt costs one forward pass and two backward passes, each for all layers at once: one from the true next tokens
    (gradient norms), one from next tokens drawn from the model's own distribution (predicted losses). With
    `labels="true"` one backward pass serves both, and predictions are too large by a factor that differs from layer
    to layer.

    Args:
        model: A causal language model whose attention goes through transformers' attention interface.
        tokens: Calibration prompts, integers `[prompts, tokens]`. Take them from other texts than those a plan is
            evaluated on.
        key_specs: Candidate formats of keys; by default those of `default_specs`.
        value_specs: Candidate formats of values, likewise.
        window: Tokens the cache will keep exactly, which no storage error touches; plans made from the profile keep
            the same.
        labels: Next tokens behind the predicted losses.
        batch: Prompts in one forward pass; the numbers do not depend on it.
        attention_mask: `[prompts, tokens]`, 0 where a prompt is padded; padding is neither attended to nor scored.
        texts: Names of the texts the prompts come from, for the record.
        seed: Of the drawn next tokens.
        signal: Name of the registered signal that predicts losses.
        progress: Called after each batch.

    Returns:
        The profile; each of its numbers is a mean over prompts beside its standard deviation.

    Raises:
        DataError: A prompt has nothing to score, is too short to fill a page, or gives no finite loss, or `batch` is
            not positive.
        ModelError: The model's attention, or its key and value projections, cannot be measured.
        PlanError: A format does not fit the model's head_dim, its rotation or its codebook is to be calibrated for each
            layer, or no signal has that name.
    """
    started = time.perf_counter()
    if batch < 1:
        raise DataError(f"batch is {batch}; read at least one prompt at a time.")
    fingerprint = Fingerprint.of(model)
    defaults = default_specs(fingerprint.head_dim)
    keys, values = list(key_specs or defaults[0]), list(value_specs or defaults[1])
    prompts = Prompts.of(tokens, attention_mask, seed)
    meter = Meter(model, fingerprint, keys, values, window, prompts.tokens.shape[1])
    signals: dict[Labels, list[Signal]] = {"true": [GRADIENT_NORM]}
    signals.setdefault(labels, []).append(get(signal))
    scores = _read(meter, prompts, signals, batch, progress)
    return Profile(
        model=fingerprint,
        gradient=_gradient_norms(*scores[GRADIENT_NORM.name]),
        table=_loss_table(signal, fingerprint, window, keys, values, *scores[signal]),
        calibration=Calibration(
            sha256=prompts.sha256,
            texts=list(texts),
            prompts=len(prompts),
            tokens=prompts.tokens.shape[1],
            seed=seed,
        ),
        seconds=time.perf_counter() - started,
    )


def _read(
    meter: Meter,
    prompts: Prompts,
    signals: dict[Labels, list[Signal]],
    batch: int,
    progress: Progress | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores of keys and of values by signal, float64 `[prompts, layers, columns]`."""
    report = progress or silent
    report(0, len(prompts), _LABEL)
    batches = []
    for start in range(0, len(prompts), batch):
        batches.append(meter.read(prompts.batch(start, batch), signals))
        report(min(start + batch, len(prompts)), len(prompts), _LABEL)
    return {
        name: (
            torch.cat([scores[name][0] for scores in batches]).double(),
            torch.cat([scores[name][1] for scores in batches]).double(),
        )
        for name in batches[0]
    }


def silent(done: int, total: int, label: str) -> None:
    """Reports nothing."""


def _gradient_norms(keys: Tensor, values: Tensor) -> GradientNorms:
    """From `[prompts, layers, 1]`."""
    return GradientNorms(
        key=keys.mean(dim=0)[:, 0].tolist(),
        value=values.mean(dim=0)[:, 0].tolist(),
        key_spread=_spread(keys)[:, 0].tolist(),
        value_spread=_spread(values)[:, 0].tolist(),
    )


def _loss_table(
    signal: str,
    fingerprint: Fingerprint,
    window: Window,
    key_specs: list[TensorSpec],
    value_specs: list[TensorSpec],
    keys: Tensor,
    values: Tensor,
) -> LossTable:
    """From `[prompts, layers, specs]`."""
    return LossTable(
        signal=signal,
        model=fingerprint,
        window=window,
        layers=list(fingerprint.packed_layers),
        key_specs=key_specs,
        value_specs=value_specs,
        key_loss=keys.mean(dim=0).tolist(),
        value_loss=values.mean(dim=0).tolist(),
        key_spread=_spread(keys).tolist(),
        value_spread=_spread(values).tolist(),
    )


def _spread(scores: Tensor) -> Tensor:
    """Standard deviation over prompts (of these prompts, not an estimate for others)."""
    return scores.std(dim=0, correction=0)
