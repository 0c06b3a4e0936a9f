"""Measures a model: what its keys and values of every layer matter, from a few prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom import codecs
from kvloom.errors import DataError
from kvloom.plan import Fingerprint, TensorSpec, Window
from kvloom.signals._base import SIDES, Labels, LayerSignal, ModelSignal, Scores, Signal
from kvloom.signals._error_gradient import ErrorGradient
from kvloom.signals._gradient_norm import WEIGHT_GRADIENT
from kvloom.signals._measure import Meter
from kvloom.signals._pieces import Pieces
from kvloom.signals._profile import GradientNorms, Profile
from kvloom.signals._prompts import Prompts
from kvloom.signals._registry import get
from kvloom.signals._table import LossTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]
"""`(done, total, what is being done)`; prompts, or for a signal with steps of its own, those of all prompts."""

_LABEL = "reading prompts"
DEFAULT_SIGNAL = ErrorGradient.name
"""The signal that predicts best for what it costs."""

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
    labels: Labels | None = None,
    batch: int = 1,
    attention_mask: Tensor | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
    signal: str = DEFAULT_SIGNAL,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measures how much every layer's keys and values matter.

    By default a prompt costs one forward pass and two backward passes, each for all layers at once: one from the true
    next tokens (gradient norms), one from next tokens drawn from the model's own distribution (predicted losses). A
    signal of the true next tokens takes one backward pass, one that looks at forward passes alone takes none, and then
    the profile has no gradient norms.

    Args:
        model: A causal language model whose attention goes through transformers' attention interface.
        tokens: Calibration prompts, integers `[prompts, tokens]`. Take them from other texts than those a plan is
            evaluated on.
        key_specs: Candidate formats of keys; by default those of `default_specs`.
        value_specs: Candidate formats of values, likewise.
        window: Tokens the cache will keep exactly, which no storage error touches; plans made from the profile keep
            the same.
        labels: Next tokens behind the predicted losses, by default the signal's own. With `"true"` one backward pass
            serves `error_gradient` and the gradient norms, and predictions are too large by a factor that differs from
            layer to layer.
        batch: Prompts in one forward pass; the numbers do not depend on it.
        attention_mask: `[prompts, tokens]`, 0 where a prompt is padded; padding is neither attended to nor scored.
        texts: Names of the texts the prompts come from, for the record.
        seed: Of the drawn next tokens.
        signal: Name of the registered signal that predicts losses.
        out: The file the profile will be saved to: finished pieces are kept beside it, in `<out>.pieces`, so that a run
            that was killed goes on where it stopped. Those of a signal or a codec of your own are read again while its
            file is the same, and not kept if it has none.
        progress: Called after each batch.

    Returns:
        The profile; each of its numbers is a mean over prompts beside its standard deviation.

    Raises:
        DataError: A token id is not in the model's vocabulary, a prompt has nothing to score, is too short to fill a
            page, or gives no finite loss or score, `batch` is not positive, or `labels` are given for a signal without
            a backward pass.
        ModelError: The model's attention, or its key and value projections, cannot be measured.
        PlanError: A format does not fit the model's head_dim, its rotation or its codebook is to be calibrated for each
            layer, or no signal has that name.
        ValueError: A signal of your own gives scores of another shape than it should.
    """
    if batch < 1:
        raise DataError(f"batch is {batch}; read at least one prompt at a time.")
    chosen = get(signal)
    passes = _passes(chosen, labels)
    fingerprint = Fingerprint.of(model)
    defaults = default_specs(fingerprint.head_dim)
    keys, values = list(key_specs or defaults[0]), list(value_specs or defaults[1])
    prompts = Prompts.of(model, tokens, attention_mask, seed)
    meter = Meter(model, fingerprint, keys, values, window, prompts.tokens.shape[1])
    about = {
        "signal": signal,
        "labels": labels,
        "window": window.model_dump(mode="json"),
        "specs": [[spec.model_dump(mode="json") for spec in specs] for specs in (keys, values)],
    }
    storing = (codecs.get(fmt.codec) for formats in meter.formats.values() for fmt in formats)
    pieces = Pieces(out, model, about, [chosen, *storing])
    scores = _read(meter, prompts, chosen, passes, pieces, batch, progress or silent)
    norms = scores.get(WEIGHT_GRADIENT.name)
    return Profile(
        model=fingerprint,
        gradient=None if norms is None else _gradient_norms(norms["key"], norms["value"]),
        table=_loss_table(signal, fingerprint, window, keys, values, scores[signal]),
        calibration=prompts.calibration(texts, seed),
        seconds=pieces.seconds,
    )


def _passes(signal: Signal, labels: Labels | None) -> dict[Labels | None, list[LayerSignal]]:
    """What looks at which pass; gradient norms come with every backward pass."""
    if isinstance(signal, LayerSignal) and signal.labels is not None:
        passes: dict[Labels | None, list[LayerSignal]] = {"true": [WEIGHT_GRADIENT]}
        passes.setdefault(labels or signal.labels, []).append(signal)
        return passes
    if labels is not None:
        raise DataError(f"labels is {labels!r}, and signal {signal.name!r} has no backward pass: leave labels out.")
    return {None: [signal]} if isinstance(signal, LayerSignal) else {}


def _read(
    meter: Meter,
    prompts: Prompts,
    signal: Signal,
    passes: dict[Labels | None, list[LayerSignal]],
    pieces: Pieces,
    batch: int,
    report: Progress,
) -> dict[str, Scores]:
    """Scores by signal, float64 `[prompts, layers, heads, columns]` of each side."""
    steps = signal.steps(meter) if isinstance(signal, ModelSignal) else 1
    done, total = 0, steps * len(prompts)
    report(done, total, _LABEL)
    batches = []
    for start in range(0, len(prompts), batch):
        some = prompts.batch(start, batch)

        def step(some: Prompts = some) -> None:
            nonlocal done
            done += len(some)
            report(done, total, _LABEL)

        if isinstance(signal, ModelSignal):
            measured = signal.measure(meter, some, pieces, step)
            _check_scores(signal.name, measured, meter, len(some))
            batches.append({signal.name: measured})
        else:
            batches.append(_looked_at(meter, some, passes, pieces))
            step()
    return {
        name: {side: torch.cat([scores[name][side] for scores in batches]).double() for side in SIDES}
        for name in batches[0]
    }


def _looked_at(
    meter: Meter, prompts: Prompts, passes: dict[Labels | None, list[LayerSignal]], pieces: Pieces
) -> dict[str, Scores]:
    """Scores of one batch: a piece."""

    def make() -> dict[str, Tensor]:
        read = meter.read(prompts, passes)
        for name, sides in read.items():
            _check_scores(name, sides, meter, len(prompts))
        return {f"{name}.{side}": scores for name, sides in read.items() for side, scores in sides.items()}

    made = pieces.get(dict(prompts.identity), make)
    names = [signal.name for signals in passes.values() for signal in signals]
    return {name: {side: made[f"{name}.{side}"] for side in SIDES} for name in names}


def _check_scores(name: str, scores: Scores, meter: Meter, batch: int) -> None:
    """Refuse what a signal must not give, before it is kept.

    Raises:
        DataError: A score is not finite.
        ValueError: The signal gives another shape than it should.
    """
    for side in SIDES:
        given, heads = scores[side], meter.shape.num_kv_heads
        columns = 1 if name == WEIGHT_GRADIENT.name else len(meter.formats[side])
        if given.shape not in {(batch, len(meter.layers), own, columns) for own in (1, heads)}:
            raise ValueError(
                f"signal {name!r} scores the {side}s of {len(meter.layers)} layers as {list(given.shape)}: give "
                f"[{batch} prompts, {heads} heads or 1, {columns} formats] of each layer."
            )
        wrong = (~given.isfinite()).any(dim=0).flatten(1).any(dim=1)
        if bool(wrong.any()):
            layer = meter.layers[int(wrong.int().argmax())]
            raise DataError(
                f"signal {name!r} gives no finite number for the {side}s of layer {layer}: load the model in a wider "
                "dtype (float32), or choose another signal."
            )


def silent(done: int, total: int, label: str) -> None:
    """Reports nothing."""


def _gradient_norms(keys: Tensor, values: Tensor) -> GradientNorms:
    """From `[prompts, layers, 1, 1]`."""
    return GradientNorms(
        key=keys.mean(dim=0)[:, 0, 0].tolist(),
        value=values.mean(dim=0)[:, 0, 0].tolist(),
        key_spread=_spread(keys)[:, 0, 0].tolist(),
        value_spread=_spread(values)[:, 0, 0].tolist(),
    )


def _loss_table(
    signal: str,
    fingerprint: Fingerprint,
    window: Window,
    key_specs: list[TensorSpec],
    value_specs: list[TensorSpec],
    scores: Scores,
) -> LossTable:
    """From `[prompts, layers, heads, specs]` of each side."""
    losses = {f"{side}_loss": scores[side].sum(dim=2).mean(dim=0).tolist() for side in SIDES}
    spreads = {f"{side}_spread": _spread(scores[side].sum(dim=2)).tolist() for side in SIDES}
    heads = {f"{side}_head_loss": _by_head(scores[side], fingerprint.num_kv_heads) for side in SIDES}
    return LossTable(
        signal=signal,
        model=fingerprint,
        window=window,
        layers=list(fingerprint.packed_layers),
        key_specs=key_specs,
        value_specs=value_specs,
        **losses,
        **spreads,
        **heads,
    )


def _by_head(scores: Tensor, heads: int) -> list[list[list[float]]] | None:
    """`[layers][heads][specs]`; None if the signal does not tell heads apart."""
    if scores.shape[2] != heads:
        return None
    means: list[list[list[float]]] = scores.mean(dim=0).tolist()
    return means


def _spread(scores: Tensor) -> Tensor:
    """Standard deviation over prompts (of these prompts, not an estimate for others)."""
    return scores.std(dim=0, correction=0)
