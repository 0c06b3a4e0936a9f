"""How well signals predict what plans cost: random plans are measured, and each signal's predictions ranked with them.

Plans of widely differing bits are easily put in order: any signal that grows with the error does. So there are two sets
of plans, one spread over true bits and one of nearly equal true bits, where only knowing which layer and side matters
helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from kvloom._ledger import Ledger, Record, fingerprint, pieces_path
from kvloom.evaluate._contestants import plan_contestant
from kvloom.evaluate._context import (
    Progress,
    check_model,
    silent,
    surroundings,
    tokens_hash,
)
from kvloom.evaluate._correlation import pearson, spearman
from kvloom.evaluate._fidelity import Protocol, check_windows, piece_scores, score_windows
from kvloom.evaluate._random_plans import Group, PlanCounts, RandomPlan, random_plans
from kvloom.evaluate._records import write_records
from kvloom.plan import Fingerprint, TensorSpec
from kvloom.signals import FOUR_SINKS, Profile, compute_profile, default_specs, get, signals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TINY = 1e-30
"""Below every loss: a prediction of nothing has a logarithm too."""


def compare_signals(
    model: PreTrainedModel,
    windows: Tensor,
    prompts: Tensor,
    *,
    wanted: Sequence[str] | None = None,
    plans: PlanCounts | None = None,
    protocol: Protocol | None = None,
    texts: Sequence[str] = (),
    calibration: Sequence[str] = (),
    name: str | None = None,
    out: Path | None = None,
    share: tuple[int, int] = (1, 1),
    batch: int = 1,
    progress: Progress = silent,
) -> list[Record]:
    """Correlate every signal's predictions with the measured KLD of random plans.

    Plans are read as decoding token by token reads them, through the packed cache. Each signal is measured on its own,
    so that its seconds are its own.

    Args:
        model: a causal language model in evaluation mode.
        windows: int64 token ids `[windows, tokens]` that plans are scored on.
        prompts: int64 token ids `[prompts, tokens]` of other texts, that signals are measured on.
        wanted: names of signals; by default all but the measured ones, which take hours on a CPU.
        plans: how many random plans, of which true bits.
        protocol: as in `fidelity`.
        texts: names of the texts the windows come from, for the records.
        calibration: names of the texts the prompts come from.
        name: of the model in the records; by default the last part of its path.
        out: results file. Finished (plan, window) pieces and pieces of profiles are kept beside it, and so are the
            profiles.
        share: `(2, 8)` measures every eighth plan, from the second on, and makes no records: when all shares are done,
            a call without one makes them from the pieces of all.
        batch: windows in one forward pass, and prompts.
        progress: told before every piece of work.

    Returns:
        A `signal_comparison` record for each signal, then a `random_plan` record for each plan; none for a share.

    Raises:
        DataError: the windows or prompts do not fit the model or each other, or there are too few plans.
        PlanError: a signal is unknown.
    """
    protocol, plans = protocol or Protocol(), plans or PlanCounts()
    names = list(wanted) if wanted is not None else [it for it in signals() if not it.startswith("measured")]
    for signal in names:
        get(signal)
    check_model(model)
    check_windows(model, windows, [], protocol)
    shape = Fingerprint.of(model)
    keys, values = default_specs(shape.head_dim)
    drawn = random_plans(
        shape,
        keys,
        values,
        window=FOUR_SINKS,
        tokens=windows.shape[1],
        counts=plans,
    )
    first, shares = share
    whole = share == (1, 1)
    profiles = {
        signal: _profile(model, prompts, signal, (keys, values), calibration, out, batch, progress)
        for signal in names
        if whole
    }
    divergences = _measured(model, windows, drawn[first - 1 :: shares], protocol, _ledger(out, share), batch, progress)
    if not whole:
        return []
    context = {**surroundings(model, name), "text": {"names": list(texts), "sha256": tokens_hash(windows)}}
    records = _records(drawn, divergences, profiles, windows, protocol, context)
    if out:
        write_records(out, records)
    return records


def _ledger(out: Path | None, share: tuple[int, int]) -> Ledger:
    """Own pieces, and those that other shares have finished."""
    if out is None:
        return Ledger(None)
    own = pieces_path(out if share == (1, 1) else out.with_name(f"{out.stem}-{share[0]}-of-{share[1]}{out.suffix}"))
    others = [path for path in sorted(out.parent.glob(f"{out.stem}-*-of-*{own.suffix}")) if path != own]
    return Ledger(own, others)


def _measured(
    model: PreTrainedModel,
    windows: Tensor,
    drawn: Sequence[RandomPlan],
    protocol: Protocol,
    ledger: Ledger,
    batch: int,
    progress: Progress,
) -> list[float]:
    """KLD of each plan, mean over all scored tokens."""
    entrants = [plan_contestant(it.plan, model, name=it.name, method="random") for it in drawn]
    scored = score_windows(
        model, windows, entrants, protocol, ledger, progress, batch, kind="random_plan_piece", kept=_mean_kld
    )
    return [sum(piece["kld"] for piece in own) / len(own) for own in scored]


def _mean_kld(piece: Record) -> Record:
    return {"kld": float(piece_scores([piece]).kld.double().mean())}


def _profile(
    model: PreTrainedModel,
    prompts: Tensor,
    signal: str,
    specs: tuple[list[TensorSpec], list[TensorSpec]],
    texts: Sequence[str],
    out: Path | None,
    batch: int,
    progress: Progress,
) -> Profile:
    """A signal's profile, kept beside the results."""
    path = out.with_name(f"{out.stem}-{signal}.json") if out else None
    made = compute_profile(
        model,
        prompts,
        key_specs=specs[0],
        value_specs=specs[1],
        texts=texts,
        batch=batch,
        signal=signal,
        out=path,
        progress=lambda done, total, what: progress(f"{signal}, {what}", done, total),
    )
    if path:
        made.save(path)
    return made


def _records(
    drawn: Sequence[RandomPlan],
    divergences: Sequence[float],
    profiles: Mapping[str, Profile],
    windows: Tensor,
    protocol: Protocol,
    context: Record,
) -> list[Record]:
    tokens = windows.shape[1]
    bits = [it.plan.true_bits(tokens, dtype=torch.bfloat16) for it in drawn]
    predicted = {name: [made.table.predicted_loss(it.specs) for it in drawn] for name, made in profiles.items()}
    about = {
        "context": tokens,
        "windows": len(windows),
        "scored_tokens": len(windows) * (tokens - protocol.unscored - 1),
        "chunk": protocol.chunk,
        "unscored": protocol.unscored,
        **context,
    }
    groups = {group: [n for n, it in enumerate(drawn) if it.group == group] for group in get_args(Group)}
    compared = [
        {
            "kind": "signal_comparison",
            "id": fingerprint({"signal": name, "plans": [it.name for it in drawn], "on": _setting(about)}),
            "name": name,
            "seconds": round(made.seconds, 3),
            "prompts": made.calibration.prompts,
            "prompt_tokens": made.calibration.tokens,
            **{
                group: _correlations(predicted[name], divergences, bits, rows) for group, rows in groups.items() if rows
            },
            **about,
        }
        for name, made in profiles.items()
    ]
    plans = [
        {
            "kind": "random_plan",
            "id": fingerprint({"plan": it.name, "on": _setting(about)}),
            "name": it.name,
            "group": it.group,
            "true_bits": bits[n],
            "kld": divergences[n],
            "predicted": {name: losses[n] for name, losses in predicted.items()},
            **about,
        }
        for n, it in enumerate(drawn)
    ]
    return [*compared, *plans]


def _setting(about: Record) -> list[object]:
    return [about[key] for key in ("model", "device", "dtype", "text", "chunk", "unscored")]


def _correlations(
    predicted: Sequence[float], measured: Sequence[float], bits: Sequence[float], rows: Iterable[int]
) -> Record:
    """Of the plans of one group."""
    picked = list(rows)
    x, y, own = (
        torch.tensor([values[n] for n in picked], dtype=torch.float64) for values in (predicted, measured, bits)
    )
    logs = x.clamp_min(_TINY).log(), y.clamp_min(_TINY).log()
    return {
        "plans": len(picked),
        "true_bits": [float(own.min()), float(own.max())],
        "kld": [float(y.min()), float(y.max())],
        "spearman": spearman(x, y).interval().as_dict(),
        "pearson": pearson(x, y).interval().as_dict(),
        "pearson_log": pearson(*logs).interval().as_dict(),
    }
