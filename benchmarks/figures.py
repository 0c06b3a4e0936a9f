"""The figures of the first release, on at least 16,000 scored tokens of real text.

    python benchmarks/figures.py                      # everything; hours on two cores, resumable
    python benchmarks/figures.py --parts needle       # one part

Parts: `fidelity` (all plans and peers), `like-for-like` (plans at the peers' bits, read as the
    peers are), `decode`, `needle`, `drift`, `arrival`. Every finished piece of the others is kept, so
    that a run that was killed goes on where it stopped; records go to `<out>/<part>.jsonl`, the profile to
    `<out>/profile.json` (delete it to measure anew), and a verdict on every figure to the terminal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, linear_regression
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvloom import disable, enable
from kvloom.assets import CALIBRATION, EVALUATION, MODEL_NAME, load_model, texts, token_windows
from kvloom.demo import KVMIX, SINKS, UNIFORM, Entry, exact_name, lineup, nominal_bits, uniform_name
from kvloom.evaluate import (
    WARM_UP,
    Contestant,
    Peers,
    Protocol,
    Record,
    decode_speed,
    dense_contestant,
    drift,
    fidelity,
    needle,
    paired_difference,
    paired_speed,
    peer_contestants,
)
from kvloom.report import render_text
from kvloom.signals import Profile, compute_profile

CONTEXT = 2048
WINDOW = CONTEXT + 4  # thirty-two pages and the sinks; see `lineup`
WINDOWS = 9
PROMPTS, PROMPT_TOKENS = 16, 512
DECODE_STEPS = 64
DRIFT_WINDOWS, DRIFT_START = 4, 4
ARRIVAL_PROMPTS, ARRIVAL_CUTS, ARRIVAL_TOKENS = 4, (PROMPT_TOKENS, 64, 37), 32
SEED = 0

UNIFORM_LIMITS = {(4, 4): 0.012, (3, 3): 0.06, (4, 2): 0.08, (2, 2): 0.5}
PEER_GAIN = 1.5
PROFILE_SECONDS = 180
NEEDLE_PLAN = exact_name(3.5)
LIKE = ", chunk exact"


@dataclass(frozen=True)
class Verdict:
    """A figure that was to be reached, and whether it was."""

    reached: bool
    figure: str

    def __str__(self) -> str:
        return f"{'reached' if self.reached else 'MISSED '}  {self.figure}"


class Bench:
    """A model, its plans and where results go."""

    def __init__(self, model: str, out: Path, windows: int, window: int) -> None:
        self.model, self.tokenizer = load_model(model)
        self.out = out
        self.count, self.context = windows, window
        self.started = perf_counter()

    def progress(self, what: str, done: int, total: int) -> None:
        """Print what is being done."""
        print(f"{perf_counter() - self.started:7.0f} s  {done}/{total}  {what}", flush=True)

    def windows(self, texts_of: tuple[str, ...], tokens: int, count: int) -> Tensor:
        """Token windows `[count, tokens]`."""
        return token_windows(self.tokenizer, texts(texts_of), tokens, count, SEED)

    @cached_property
    def profile(self) -> Profile:
        """The profile, measured once."""
        path = self.out / "profile.json"
        if not path.exists():
            profile = compute_profile(
                self.model,
                self.windows(CALIBRATION, PROMPT_TOKENS, PROMPTS),
                texts=CALIBRATION,
                seed=SEED,
                out=path,
                progress=lambda done, total, what: self.progress(what, done, total),
            )
            self.out.mkdir(parents=True, exist_ok=True)
            profile.save(path)
        return Profile.load(path)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Plans by name, one for each budget twice over: uniform (or KVmix's), and exact."""
        every = lineup(self.profile, self.context, (*UNIFORM, (4, 2)))
        return {entry.name: entry for entry in every}

    @cached_property
    def peers(self) -> Peers:
        """QuantizedCache in every configuration that runs here."""
        return peer_contestants(self.model)

    def best_peers(self, bits: int) -> list[Contestant]:
        """QuantizedCache as best configured (quanto, keys per channel), at a number of bits."""
        return [
            peer
            for peer in self.peers.contestants
            if peer.settings["nbits"] == bits and peer.method == "quanto" and peer.name.endswith("best axes")
        ]

    def matching(self, names: list[str], prefill: Any) -> list[Contestant]:
        """The plans of these names as contestants."""
        return [self.entries[name].contestant(self.model, prefill) for name in names]

    def file(self, part: str) -> Path:
        """Results file of a part."""
        return self.out / f"{part}.jsonl"


def run_fidelity(bench: Bench) -> Iterator[Verdict]:
    """All plans, read as decoding token by token reads them, and QuantizedCache at its best."""
    records = fidelity(
        bench.model,
        bench.windows(EVALUATION, bench.context, bench.count),
        [
            *bench.matching(list(bench.entries), "quantized"),
            *bench.best_peers(2),
            *bench.best_peers(4),
        ],
        texts=EVALUATION,
        out=bench.file("fidelity"),
        progress=bench.progress,
    )
    print(render_text(records))
    scored = {record["name"]: record for record in records}
    tokens = records[0]["scored_tokens"]
    yield Verdict(tokens >= 16_000, f"{tokens:,} scored tokens, at least 16,000")
    seconds = bench.profile.seconds
    yield Verdict(seconds < PROFILE_SECONDS, f"profile in {seconds:.0f} s, under {PROFILE_SECONDS}")
    for bits, limit in UNIFORM_LIMITS.items():
        record = scored[uniform_name(*bits)]
        yield Verdict(record["kld"]["value"] <= limit, f"{_kld(record)}, at most {limit}")
    for rival in [uniform_name(*bits) for bits in UNIFORM] + [KVMIX]:
        ours = scored[exact_name(nominal_bits(bench.entries[rival].plan))]
        yield _below(ours, scored[rival], 1.0)
        if rival + SINKS in scored:
            yield _below(ours, scored[rival + SINKS], 1.0)
    for peer in bench.best_peers(2):
        yield _below(scored[exact_name(2.5)], scored[peer.name], PEER_GAIN)


def run_like_for_like(bench: Bench) -> Iterator[Verdict]:
    """Plans whose forward passes read their own tokens exactly, as QuantizedCache's do."""
    names = [uniform_name(2, 2), exact_name(2.5), uniform_name(4, 4), exact_name(4.5)]
    sinks = bench.profile.table.window.sinks
    plans = [
        replace(plan, name=plan.name + LIKE, offset=sinks if plan.method == "exact" else 0)
        for plan in bench.matching(names, "exact")
    ]
    records = fidelity(
        bench.model,
        bench.windows(EVALUATION, bench.context, bench.count),
        [*plans, *bench.best_peers(2), *bench.best_peers(4)],
        texts=EVALUATION,
        out=bench.file("like-for-like"),
        progress=bench.progress,
    )
    print(render_text(records))
    scored = {record["name"]: record for record in records}
    for bits, name in ((2, exact_name(2.5)), (4, exact_name(4.5))):
        for peer in bench.best_peers(bits):
            yield _below(scored[name + LIKE], scored[peer.name], PEER_GAIN if bits == 2 else 1.0)


def run_decode(bench: Bench) -> Iterator[Verdict]:
    """Seconds of one step at 2K tokens of context, all in turn."""
    names = [uniform_name(2, 2), uniform_name(4, 4), exact_name(2.5), NEEDLE_PLAN]
    records = decode_speed(
        bench.model,
        bench.windows(EVALUATION, CONTEXT + WARM_UP + DECODE_STEPS, 1)[0],
        [dense_contestant(bench.model), *bench.matching(names, "exact"), *bench.peers.contestants],
        context=CONTEXT,
        steps=DECODE_STEPS,
        out=bench.file("decode"),
        progress=bench.progress,
    )
    timed = {record["name"]: record for record in records}
    for record in records:
        speed = record["tokens_per_s"]
        print(f"{record['name']:28} {speed['value']:6.2f} tokens/s")
    for peer in bench.peers.contestants:
        gain = paired_speed(timed[NEEDLE_PLAN], timed[peer.name])
        yield Verdict(
            gain["low"] >= 1,
            f"{NEEDLE_PLAN} decodes {_times(gain)} as fast as {peer.name}, at least 1",
        )


def run_needle(bench: Bench) -> Iterator[Verdict]:
    """Is the needle found as often as with the dense cache?"""
    names = [NEEDLE_PLAN, exact_name(2.5), uniform_name(2, 2)]
    records = needle(
        bench.model,
        bench.tokenizer,
        "\n\n".join(text.content for text in texts(EVALUATION)),
        [
            dense_contestant(bench.model),
            *bench.matching(names, "exact"),
            *bench.best_peers(2),
        ],
        out=bench.file("needle"),
        progress=bench.progress,
    )
    found = {record["name"]: record["found"] for record in records}
    for record in records:
        print(f"{record['name']:28} {record['found']} of {record['total']}")
    yield Verdict(
        found[NEEDLE_PLAN] >= found["dense"],
        f"{NEEDLE_PLAN} finds {found[NEEDLE_PLAN]} needles, the dense cache {found['dense']}",
    )


def run_drift(bench: Bench) -> Iterator[Verdict]:
    """Does decoding 2,000 tokens one by one leave another cache than reading them at once?

    The KLD itself grows with the context until the exact tokens no longer matter, so its slope (printed) is no measure
    of drift: the same tokens in one forward pass are.
    """
    windows = bench.windows(EVALUATION, WINDOW, 1)
    plans = bench.matching([uniform_name(2, 2), NEEDLE_PLAN], "quantized")
    decoded, at_once = (
        fidelity(
            bench.model,
            windows,
            plans,
            protocol=Protocol(chunk=chunk, unscored=DRIFT_START),
            texts=EVALUATION,
            out=bench.file(f"drift-{chunk}"),
            progress=bench.progress,
        )
        for chunk in (1, WINDOW - 1)
    )
    for one, other in zip(decoded, at_once, strict=True):
        apart = [a - b for a, b in zip(one["blocks"]["kld"], other["blocks"]["kld"], strict=True)]
        slope, error = _trend(apart)
        yield Verdict(
            slope <= 2 * error,
            f"{one['name']}: {sum(one['blocks']['tokens']):,} tokens decoded one by one, mean KLD "
            f"{one['kld']['value']:.5f}, at once {other['kld']['value']:.5f}; the difference rises by "
            f"{slope:.1e} +- {2 * error:.1e} a block of {Protocol().block} tokens",
        )
    names = [uniform_name(2, 2), exact_name(2.5), NEEDLE_PLAN, uniform_name(4, 4)]
    records = drift(
        bench.model,
        bench.windows(EVALUATION, WINDOW, DRIFT_WINDOWS),
        [*bench.matching(names, "quantized"), *bench.best_peers(2)],
        protocol=Protocol(),
        out=bench.file("drift"),
        progress=bench.progress,
    )
    for record in records:
        blocks = record["blocks"]
        first, rest = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        halves = f"{fmean(first):.4f} in the first half, then {fmean(rest):.4f}"
        print(f"{record['name']}: {record['steps']:,} steps, KLD {halves}")


def run_arrival(bench: Bench) -> Iterator[Verdict]:
    """The same greedy tokens however the prompt arrives."""
    prompts = bench.windows(EVALUATION, PROMPT_TOKENS, ARRIVAL_PROMPTS)
    enable(bench.model, batch_invariant=True)
    for name in (uniform_name(2, 2), uniform_name(4, 4), NEEDLE_PLAN):
        (contestant,) = bench.matching([name], "quantized")
        whole, *others = ([_continued(bench.model, contestant, p, cut) for p in prompts] for cut in ARRIVAL_CUTS)
        same = sum(a == b for other in others for a, b in zip(whole, other, strict=True))
        total = len(others) * len(prompts)
        yield Verdict(same == total, f"{name}: {same} of {total} continuations do not depend on the prompt's cuts")
    disable(bench.model)


@torch.no_grad()
def _continued(model: Any, contestant: Contestant, prompt: Tensor, cut: int) -> list[int]:
    """Greedy tokens after a prompt that is read ``cut`` tokens at a time."""
    cache, tokens = contestant.make_cache(), []
    for piece in prompt.split(cut):
        logits = model(piece[None], past_key_values=cache).logits[0, -1]
    for _ in range(ARRIVAL_TOKENS):
        tokens.append(int(logits.argmax()))
        logits = model(torch.tensor([tokens[-1:]], device=prompt.device), past_key_values=cache).logits[0, -1]
    return tokens


def _trend(values: Sequence[float]) -> tuple[float, float]:
    """Slope of a line through values at 0, 1, 2, ..., by least squares, and its standard error."""
    at = range(len(values))
    slope, offset = linear_regression(at, values)
    rest = sum((value - offset - slope * x) ** 2 for x, value in zip(at, values, strict=True))
    spread = sum((x - fmean(at)) ** 2 for x in at)
    return slope, (rest / (len(values) - 2) / spread) ** 0.5


PARTS: dict[str, Callable[[Bench], Iterator[Verdict]]] = {
    "fidelity": run_fidelity,
    "like-for-like": run_like_for_like,
    "decode": run_decode,
    "needle": run_needle,
    "drift": run_drift,
    "arrival": run_arrival,
}


def _below(ours: Record, theirs: Record, times: float) -> Verdict:
    """Is our KLD below theirs, by a factor, beyond the paired interval?"""
    gain = paired_difference(theirs, ours)["ratio"]
    return Verdict(
        gain["low"] > times,
        f"{_kld(theirs)} is {_times(gain)} that of {_kld(ours)}, above {times:g}",
    )


def _kld(record: Record) -> str:
    return f"{record['name']} ({record['true_bits']:.3f} bits) KLD {_interval(record['kld'])}"


def _times(gain: dict[str, float]) -> str:
    return f"{_interval(gain)} times"


def _interval(entry: dict[str, float]) -> str:
    return f"{entry['value']:.4g} [{entry['low']:.4g}, {entry['high']:.4g}]"


def main() -> None:
    """Run the parts asked for and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL_NAME)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--window", type=int, default=WINDOW)
    asked = parser.parse_args()
    bench = Bench(asked.model, asked.out, asked.windows, asked.window)
    verdicts = [verdict for part in asked.parts.split(",") for verdict in PARTS[part](bench)]
    for line in (*verdicts, *bench.peers.notes):
        print(line)


if __name__ == "__main__":
    main()
