"""The demo: profile, plans, fidelity, decode speed, samples, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.allocate import ExactFront, front_record
from kvloom.assets import CALIBRATION, EVALUATION, MODEL_NAME, load_model, texts, token_windows
from kvloom.demo._lineup import Entry, lineup
from kvloom.evaluate import (
    WARM_UP,
    Contestant,
    Peers,
    Progress,
    Protocol,
    Record,
    decode_speed,
    dense_contestant,
    fidelity,
    memory,
    model_name,
    peer_contestants,
    samples,
    silent,
    write_records,
)
from kvloom.plan import Prefill
from kvloom.report import render_html, render_text
from kvloom.signals import Profile, compute_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = (
    "The best way to learn how a machine works is to take it apart. When I was a child, my father "
    "brought home an old clock that had stopped, put it on the kitchen table, and said that I could"
    " do with it what I liked. The first thing I noticed was"
)


FRONT_TOKENS = 8192
"""Context at which the bytes of the explorer's plans are told."""


@dataclass(frozen=True)
class Sizes:
    """How much the demo does.

    Attributes:
        windows: text windows to score.
        window: tokens in each of them; also the context at which plans have equal bytes (see `lineup`): four sinks and
            twelve pages.
        chunk: tokens of one forward pass in scoring.
        prompts: calibration prompts.
        prompt_tokens: tokens in each of them.
        decode_context: tokens in the cache when decoding is timed.
        decode_steps: timed steps.
        sample_tokens: tokens of each text sample.
        seed: of the choice of prompts and windows.
    """

    windows: int = 2
    window: int = 772
    chunk: int = 128
    prompts: int = 8
    prompt_tokens: int = 512
    decode_context: int = 2048
    decode_steps: int = 9
    sample_tokens: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        table: the results as plain text.
        notes: how they were measured.
        page: the HTML page.
    """

    table: str
    notes: tuple[str, ...]
    page: Path


def run_demo(
    out: Path,
    *,
    model: str | Path = MODEL_NAME,
    sizes: Sizes | None = None,
    progress: Progress = silent,
) -> Demo:
    """Walk the whole path and write what comes out.

    Makes `profile.json`, `plans/*.json`, `runs/*.jsonl` and `report.html` below `out`. What a run
    that was killed has scored is not scored again.

    Args:
        out: folder, made if absent.
        model: name or folder, as for `kvloom.load_model`.
        sizes: how much to do; the default takes some minutes on two CPU cores.
        progress: told before every piece of work.

    Raises:
        DataError: the model or the texts have not been fetched, or the sizes do not fit them.
    """
    sizes = sizes or Sizes()
    loaded, tokenizer = load_model(model)
    runs = out / "runs"
    profile = _profile(loaded, tokenizer, sizes, progress)
    entries = lineup(profile, sizes.window)
    _save(out, profile, entries)
    progress("building QuantizedCache's backends", 0, 1)
    peers = peer_contestants(loaded)
    signal = signal_record(profile, loaded)
    write_records(runs / "signal.jsonl", [signal])
    records = [
        signal,
        *_fidelity(loaded, tokenizer, entries, peers, sizes, runs, progress),
        *_decode(loaded, tokenizer, entries, peers, sizes, runs, progress),
        *_samples(loaded, tokenizer, entries, sizes, runs, progress),
        *_memory(loaded, entries, profile, runs, progress),
    ]
    notes = _notes(profile, records, peers)
    page = out / "report.html"
    page.write_text(render_html(records, "kvloom demo", notes), encoding="utf-8")
    return Demo(render_text(records), notes, page)


def signal_record(profile: Profile, model: PreTrainedModel) -> Record:
    """The gradient norms of a profile that has some, as a `signal` record."""
    name = model_name(model)
    return {
        "kind": "signal",
        "id": f"{name} {profile.calibration.sha256[:20]}",
        "model": name,
        "layers": list(profile.table.layers),
        "gradient": profile.gradient and profile.gradient.model_dump(),
        "calibration": profile.calibration.model_dump(),
    }


def _profile(model: PreTrainedModel, tokenizer: Any, sizes: Sizes, progress: Progress) -> Profile:
    prompts = token_windows(tokenizer, texts(CALIBRATION), sizes.prompt_tokens, sizes.prompts, sizes.seed)
    return compute_profile(
        model,
        prompts,
        texts=CALIBRATION,
        seed=sizes.seed,
        progress=lambda done, total, what: progress(what, done, total),
    )


def _save(out: Path, profile: Profile, entries: Sequence[Entry]) -> None:
    (out / "plans").mkdir(parents=True, exist_ok=True)
    profile.save(out / "profile.json")
    for entry in entries:
        entry.plan.save(out / "plans" / entry.file_name)


def _fidelity(
    model: PreTrainedModel,
    tokenizer: Any,
    entries: Sequence[Entry],
    peers: Peers,
    sizes: Sizes,
    runs: Path,
    progress: Progress,
) -> list[Record]:
    windows = token_windows(tokenizer, texts(EVALUATION), sizes.window, sizes.windows, sizes.seed)
    return fidelity(
        model,
        windows,
        [*_plans(model, entries, "quantized"), *peers.contestants],
        protocol=Protocol(chunk=sizes.chunk),
        texts=EVALUATION,
        out=runs / "fidelity.jsonl",
        progress=progress,
    )


def _decode(
    model: PreTrainedModel,
    tokenizer: Any,
    entries: Sequence[Entry],
    peers: Peers,
    sizes: Sizes,
    runs: Path,
    progress: Progress,
) -> list[Record]:
    length = sizes.decode_context + WARM_UP + sizes.decode_steps
    tokens = token_windows(tokenizer, texts(EVALUATION), length, 1, sizes.seed)[0]
    return decode_speed(
        model,
        tokens,
        [*_plans(model, entries, "exact"), *peers.contestants],
        context=sizes.decode_context,
        steps=sizes.decode_steps,
        out=runs / "decode.jsonl",
        progress=progress,
    )


def _samples(
    model: PreTrainedModel,
    tokenizer: Any,
    entries: Sequence[Entry],
    sizes: Sizes,
    runs: Path,
    progress: Progress,
) -> list[Record]:
    return samples(
        model,
        tokenizer,
        PROMPT,
        _plans(model, [entry for entry in entries if entry.method != "uniform+sinks"], "exact"),
        tokens=sizes.sample_tokens,
        out=runs / "samples.jsonl",
        progress=progress,
    )


def _memory(
    model: PreTrainedModel, entries: Sequence[Entry], profile: Profile, runs: Path, progress: Progress
) -> list[Record]:
    """Bytes of the exact plans at any length, and the exact plan of any budget."""
    progress("solving for every budget", 0, 1)
    held = memory(
        model,
        _plans(model, [entry for entry in entries if entry.method == "exact"], "exact"),
        out=runs / "memory.jsonl",
    )
    front = front_record(
        ExactFront(profile, FRONT_TOKENS, dtype="bfloat16"),
        model_name(model),
        weights=held[0]["weight_bytes"],
        reads_at_most=held[0]["reads_at_most"],
    )
    write_records(runs / "front.jsonl", [front])
    return [*held, front]


def _plans(model: PreTrainedModel, entries: Sequence[Entry], prefill: Prefill) -> list[Contestant]:
    """The dense cache and every plan."""
    return [dense_contestant(model), *(entry.contestant(model, prefill) for entry in entries)]


def _notes(profile: Profile, records: Sequence[Record], peers: Peers) -> tuple[str, ...]:
    """What a reader must know to judge the figures."""
    scored = next(record for record in records if record["kind"] == "fidelity")
    timed = next(record for record in records if record["kind"] == "decode")
    calibration = profile.calibration
    return (
        f"Fidelity was scored on {scored['scored_tokens']:,} tokens ({scored['windows']} windows of"
        f" {scored['context']:,}, the first {scored['unscored']} of each not scored): enough to "
        "rank caches that differ clearly, too few for small differences; the intervals say which.",
        f"Plans were made from {calibration.prompts} prompts of {calibration.tokens} tokens of "
        f"other texts than those scored, in {profile.seconds:.0f} s.",
        "A plan's cache was scored as token-by-token decoding would read it. QuantizedCache shows "
        f"every forward pass its own tokens exactly, here up to {scored['chunk']} of them, which "
        "its true bits do not count: the comparison flatters it.",
        "Every exact plan has at most the bytes of the plan it stands beside, at this context and a"
        " 16-bit compute dtype. True bits count scales, zero points and exact tokens.",
        f"Decoding was timed step by step in turn, at {timed['context']:,} tokens of context on "
        f"{timed['device']} with {timed['threads']} threads. Weights, not the cache, dominate such "
        "a small model's step, so these times say little about large ones.",
        *peers.notes,
    )
