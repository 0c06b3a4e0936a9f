"""The table of methods in README.md: published settings, codecs and plans, measured on SmolLM2-135M-Instruct.

    python benchmarks/methods.py                         # all that needs no profile; hours on one core, resumable
    python benchmarks/methods.py --profile profile.json  # KVmix's rule and the exact plans too
    python benchmarks/methods.py --share 2/8             # every eighth row from the second on: processes share a GPU
    python benchmarks/methods.py --readme                # the table, from the results of all shares

Each share writes `<out>/share-2-of-8.jsonl`, finished pieces beside it, so that a run that was killed goes on where it
stopped. `--readme` scores nothing: it writes the table between the two markers in README.md, and the records it is made
of, without their bootstrap blocks, to `benchmarks/methods.jsonl` (a test holds README.md to them; after a change of a
row's words, `--readme --out benchmarks/methods.jsonl` makes the table again). The newest results count, with all others
of the same text, protocol and device.

One length for all: 32 pages of 64 tokens, and 7 more. A plan keeps those tokens exactly that do not fill a page besides
its sinks and its newest ones, so at another length true bits would depend on where its pages end. At this one every
plan keeps 7 or, with the newest 128, 135: sinks (4) and the newest 3 or 7 of KVmix are among the 7, and 128 are whole
pages. QuantizedCache packs at every pass of 128 tokens and ends with 7 exact tokens, too.

Left out: KVTuner (arXiv 2502.04420), whose presets are layer tables of Llama 3.1, Mistral and Qwen2.5 models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from kvloom import calibrate
from kvloom.assets import CALIBRATION, EVALUATION, MODEL_NAME, load_model, texts, token_windows
from kvloom.demo import KVMIX, SINKS, exact_name, lineup
from kvloom.errors import DataError
from kvloom.evaluate import Contestant, Progress, Record, fidelity, peer_contestants, plan_contestant
from kvloom.plan import Fingerprint, Plan, TensorSpec, Window, preset
from kvloom.report import load_records, render_text
from kvloom.signals import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Share = tuple[int, int]
"""The first, from 1, and the number of shares."""

PAGE = 64
WINDOW = 32 * PAGE + 7
WINDOWS = 35
LEAST_TOKENS = 64 * 1024
BUDGETS = ((2, 2), (3, 2), (3, 3), (4, 4))
"""Bits of the uniform plans whose bytes the exact plans get: 2.5, 3, 3.5 and 4.5 true bits."""

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
RESULTS = FOLDER / "results" / "methods"
KEPT = FOLDER / "methods.jsonl"
BEGIN, END = "<!-- methods: written by benchmarks/methods.py --readme -->", "<!-- /methods -->"
UNMEASURED = "Not measured yet: `python benchmarks/methods.py`, then the same with `--readme`, puts the table here."

FOUR = Window(sinks=4)
SAME = ("model", "device", "dtype", "text", "context", "chunk", "unscored")
"""Fields that results share where they may stand in one table."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: in the table and the records.
        source: paper, article or library.
        exact: tokens that it keeps exactly, besides those that do not fill a page.
        plan: what it stores in a model. None: a contestant of that name comes from a profile or from transformers.
        rotates: whether its rotations are calibrated before it is scored.
    """

    name: str
    source: str
    exact: str = ""
    plan: Callable[[Fingerprint], Plan] | None = None
    rotates: bool = False


def _preset(name: str, source: str, exact: str) -> Method:
    return Method(name, source, exact, partial(preset, name))


def _uniform(
    name: str, bits: int, source: str, key: str = "affine", value: str = "affine", window: Window | None = None
) -> Method:
    plan = partial(Plan.uniform, key_bits=bits, value_bits=bits, key_codec=key, value_codec=value, window=window)
    title = f"{name} K{bits}V{bits}"
    return Method(title + SINKS, source, f"first {window.sinks}", plan) if window else Method(title, source, "", plan)


def _kvquant(bits: int) -> Method:
    """Calibrated grids, keys before RoPE, 1 % outliers; the layers' codebooks are fitted before it is scored."""
    own = {"codec": "nuq", "bits": bits, "outliers": 0.01}
    key = TensorSpec.model_validate({**own, "grouping": "per_channel", "group_size": 64, "pre_rope": True})
    value = TensorSpec.model_validate({**own, "grouping": "per_token", "group_size": "head_dim"})
    source = "KVQuant, arXiv 2401.18079: keys before RoPE, 1 % outliers"
    return Method(f"nuq K{bits}V{bits}{SINKS}", source, "first 4", partial(_of_specs, key=key, value=value))


def _turboquant(bits: int) -> Method:
    own = {"codec": "lloyd", "bits": bits, "symmetric": True, "rotation": "hadamard"}
    spec = TensorSpec.model_validate({**own, "grouping": "per_token", "group_size": "head_dim"})
    plan = partial(_of_specs, key=spec, value=spec)
    return Method(f"lloyd K{bits}V{bits}{SINKS}", "TurboQuant-MSE, arXiv 2504.19874", "first 4", plan)


def _oscar(bits: int) -> Method:
    """Rotations calibrated on what queries and output projections look at, in place of the Hadamard transform alone."""
    source = f"OSCAR class, arXiv 2605.17757 (its matrix and ours: LOG.md); {_AWQ}"
    plan = partial(preset, f"kvloom/K{bits}V{bits}")
    return Method(f"calibrated rotations K{bits}V{bits}{SINKS}", source, "first 4", plan, rotates=True)


def _of_specs(model: Fingerprint, key: TensorSpec, value: TensorSpec) -> Plan:
    return Plan.from_specs(model, dict.fromkeys(model.packed_layers, (key, value)), window=FOUR)


_KIVI, _KVMIX = "KIVI, arXiv 2402.02750", "KVmix, arXiv 2506.08018"
_STREAMING, _AWQ = "sinks: StreamingLLM, arXiv 2309.17453", "clip ranges: AWQ, arXiv 2306.00978"
_HQQ, _QUANTO = "HQQ (Badri and Shaji 2023)", "optimum-quanto"
_PEER = "transformers `QuantizedCache`"

METHODS = (
    _preset("kivi/K2V2", _KIVI, "newest 128"),
    _preset("kivi/K4V4", _KIVI, "newest 128"),
    _preset("kvmix/2bit-paper", _KVMIX, "newest 3"),
    _preset("kvmix/2bit-repository", f"{_KVMIX}, its code", "newest 7"),
    _preset("kvmix/3bit-repository", f"{_KVMIX}, its code", "newest 7"),
    _preset("kvq/K4V2", "KVQ, arXiv 2502.15075", "newest 128"),
    *(_uniform("hqq", bits, _HQQ, "hqq", "hqq") for bits in (2, 4)),
    *(_uniform("quanto", bits, _QUANTO, "quanto", "quanto") for bits in (2, 4)),
    *(_kvquant(bits) for bits in (2, 3)),
    *(_turboquant(bits) for bits in (2, 3, 4)),
    *(_uniform("uniform", bits, f"grouping: {_KIVI}") for bits in (2, 3, 4)),
    *(_uniform("uniform", bits, _STREAMING, window=FOUR) for bits in (2, 3, 4)),
    *(_uniform("clipped values", bits, _AWQ, value="clipped", window=FOUR) for bits in (2, 3)),
    *(
        _preset(f"kvloom/K{bits}V{bits}", f"Hadamard: QuaRot, arXiv 2404.00456; {_AWQ}", "first 4")
        for bits in (2, 3, 4)
    ),
    *(_oscar(bits) for bits in (2, 3, 4)),
)
PROFILED = (
    Method(KVMIX, _KVMIX),
    *(Method(exact_name(bits), "kvloom", "first 4") for bits in (2.5, 3, 3.5, 4.5)),
)
PEERS = tuple(
    Method(f"{backend} {bits}b, best axes", _PEER, "newest, up to 128")
    for backend in ("quanto", "hqq")
    for bits in (2, 4)
)

NEEDED = tuple(method.name for method in (*METHODS, *PEERS) if not method.rotates)
"""Rows without which there is no table: those that need neither a profile nor calibrated rotations."""


def contestants(
    model: PreTrainedModel, profile: Profile | None, tokens: int, share: Share = (1, 1)
) -> list[Contestant]:
    """Every method that can run here, in the order of the table; or a share of them.

    Args:
        model: the model.
        profile: what exact plans and KVmix's rule are made from; None leaves them out.
        tokens: context at which exact plans have the bytes of uniform ones.
        share: as many of the plans, and as many of the others.
    """
    shape = Fingerprint.of(model)
    plans = [
        plan_contestant(made, model, name=method.name, method="uniform", prefill="quantized")
        for method in of_share(METHODS, share)
        if method.plan and (made := _fitted(method.plan(shape), method.rotates, model))
    ]
    entries = lineup(profile, tokens, BUDGETS) if profile else []
    peers = peer_contestants(model)
    for note in peers.notes:
        print(note)
    others = [*(entry.contestant(model, "quantized") for entry in entries), *peers.contestants]
    wanted = {method.name for method in (*PROFILED, *PEERS)}
    return [*plans, *of_share([other for other in others if other.name in wanted], share)]


def _fitted(plan: Plan, rotates: bool, model: PreTrainedModel) -> Plan:
    """The plan with the codebooks and rotations that it needs, from other texts than those that are scored."""
    if not (rotates or plan.needs_codebooks):
        return plan
    _, tokenizer = load_model(MODEL_NAME, device="cpu")
    tokens = token_windows(tokenizer, texts(CALIBRATION), 2048 if rotates else 512, 8, seed=0)
    return calibrate(model, plan, tokens, rotate=rotates, texts=CALIBRATION)


def evaluate(lineup_of: Callable[[PreTrainedModel], Sequence[Contestant]], asked: argparse.Namespace) -> None:
    """Score a share of a model's lineup, in float32 on any device.

    Args:
        lineup_of: what is scored.
        asked: options of `scoring_options`.
    """
    model, tokenizer = load_model(MODEL_NAME, device=asked.device, dtype="float32")
    records = fidelity(
        model,
        token_windows(tokenizer, texts(EVALUATION), asked.window, asked.windows, seed=0),
        lineup_of(model),
        texts=EVALUATION,
        out=share_file(asked),
        batch=asked.batch,
        progress=printed(),
    )
    print(render_text(records))


def printed() -> Progress:
    """Progress as lines that begin with the seconds since now."""
    started = perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        print(f"{perf_counter() - started:7.0f} s  {done}/{total}  {what}", flush=True)

    return progress


def share_file(asked: argparse.Namespace) -> Path:
    """Where a share writes its results."""
    path: Path = asked.out / "share-{}-of-{}.jsonl".format(*asked.share)
    return path


def scoring_options(description: str, out: Path) -> argparse.ArgumentParser:
    """The options of a script that scores a lineup and makes a table of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--share", type=share, default=(1, 1), metavar="I/N")
    parser.add_argument("--batch", type=int, default=1, help="windows in one forward pass")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; the first GPU if there is one")
    parser.add_argument("--readme", action="store_true")
    return parser


def of_share(whole: Sequence[T], share: Share) -> Sequence[T]:
    """What one of so many processes does: every so-and-so-manieth, from its own number on."""
    first, shares = share
    return whole[first - 1 :: shares]


def share(text: str) -> Share:
    """``2/8`` as ``(2, 8)``.

    Raises:
        ArgumentTypeError: it is no such share.
    """
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give the first and the number of shares, such as 2/8.")
    return int(first), int(of)


def comparable(
    results: Path, needed: Iterable[str], script: str = "benchmarks/methods.py", least: int = LEAST_TOKENS
) -> dict[str, Record]:
    """The newest results and those that compare with them, by name.

    Args:
        results: a file of records, or a folder of such files.
        needed: names without which there is no table.
        script: what makes them.
        least: scored tokens without which there is no table.

    Raises:
        DataError: there are none, a needed one is missing, or they cover too few tokens.
    """
    records = [record for record in load_records(results) if record["kind"] == "fidelity"]
    records.sort(key=lambda record: record["when"])
    rows = {record["name"]: record for record in records if all(record[key] == records[-1][key] for key in SAME)}
    if missing := [name for name in needed if name not in rows]:
        raise DataError(f"{results} has no results of {', '.join(missing)}: run {script} to its end.")
    if (tokens := records[-1]["scored_tokens"]) < least:
        raise DataError(
            f"{results} covers {tokens:,} scored tokens, and the table needs {least:,}: give more --windows."
        )
    return rows


def table(rows: dict[str, Record]) -> str:
    """The markdown table, and what must be known to read it."""
    lines = [
        "| method | source | codec of keys, values | exact tokens | true bits | KLD | p99 KLD | perplexity | top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(method, rows[method.name]) for method in (*METHODS, *PROFILED, *PEERS) if method.name in rows),
    ]
    return "\n".join([*lines, "", _legend(next(iter(rows.values())))])


def _line(method: Method, record: Record) -> str:
    cells = [
        f"`{method.name}`" if "/" in method.name else method.name,
        method.source,
        _stored(record),
        method.exact,
        f"{record['true_bits']:.2f}",
        interval(record["kld"], "#.3g"),
        f"{record['kld_p99']['value']:#.3g}",
        interval(record["ppl"], ".2f"),
        f"{100 * record['top1']['value']:.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _stored(record: Record) -> str:
    """Codec, bits and groups of keys and of values."""
    layers, options = record["layers"], record["settings"]
    if layers is None:
        return f"{options['backend']} {options['nbits']}b, groups of {options['q_group_size']}"
    return ", ".join(_side({layer[side] for layer in layers}) for side in ("key", "value"))


def _side(labels: set[str]) -> str:
    parts = [label.split("/") for label in labels]
    codecs = {rest[1] if rest[1:] else "affine" for _, *rest in parts}
    bits = sorted(int(width.removesuffix("b")) for width, *_ in parts)
    stored = "/".join(parts[0][:2]) if len(parts) == 1 else f"{bits[0]}b to {bits[-1]}b"
    return f"{' and '.join(sorted(codecs))} {stored}"


def interval(entry: dict[str, float], digits: str) -> str:
    """A value with its 95 % interval, as ``0.12 [0.10, 0.14]``."""
    return f"{entry['value']:{digits}} [{entry['low']:{digits}}, {entry['high']:{digits}}]"


def _legend(record: Record) -> str:
    tokens, dense = record["context"], record["ppl"]["value"] / record["ppl_ratio"]["value"]
    said = (
        f"{record['model']}, {record['dtype']}, device: {record['device']}; {record['scored_tokens']:,} scored tokens "
        f"of real text in {record['windows']} windows. True bits are those at {tokens:,} tokens "
        f"({tokens // PAGE} pages and {tokens % PAGE} tokens), with a 16-bit compute dtype. KLD, in nats a token, is "
        f"from the uncompressed cache, whose perplexity is {dense:.2f}; brackets hold 95 % intervals. `2b/ch32` is 2 "
        "bits in groups of 32 tokens of a channel, `2b/tok32` of 32 channels of a token, `tok-head` of all of them. "
        "Names in `code` are presets; their plans say (`kvloom show`) what the authors' code does otherwise. Plans are "
        "read as decoding token by token reads them; `QuantizedCache` shows a pass its own "
        f"{record['chunk']} tokens exactly, which its true bits do not count, and packs all it holds again and again."
    )
    return fill(said, 120, break_on_hyphens=False)


def write_readme(results: Path, readme: Path = README, kept: Path = KEPT) -> None:
    """Write the table between the markers, and keep what it is made of.

    Raises:
        DataError: see `comparable`; or the markers are not there.
    """
    rows = comparable(results, NEEDED)
    insert(readme, table(rows))
    kept.write_text("".join(json.dumps(without_blocks(record)) + "\n" for record in rows.values()), encoding="utf-8")


def insert(readme: Path, body: str, begin: str = BEGIN, end: str = END) -> None:
    """Write a text between two markers; see `between`."""
    before, _, after = between(readme.read_text(encoding="utf-8"), begin, end)
    readme.write_text(f"{before}\n{body}\n{after}", encoding="utf-8")


def between(text: str, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """A page up to the first marker, between the markers, and from the second one on.

    Raises:
        DataError: the markers are not there once each, in order.
    """
    before, first, rest = text.partition(begin)
    body, second, after = rest.partition(end)
    if not (first and second) or begin in rest or end in after:
        raise DataError(f"the page does not hold {begin} and then {end} once: put them where the table belongs.")
    return before + begin, body.strip("\n"), end + after


def without_blocks(record: Record) -> dict[str, Any]:
    """A record without its blocks, and with each pair of formats once."""
    pairs = {(entry["key"], entry["value"]) for entry in record["layers"] or ()}
    layers = [{"key": key, "value": value} for key, value in sorted(pairs)]
    return {key: value for key, value in record.items() if key != "blocks"} | {"layers": layers or None}


def main() -> None:
    """Score the lineup, or write the table."""
    parser = scoring_options(__doc__.split("\n")[0], RESULTS)
    parser.add_argument("--profile", type=Path)
    asked = parser.parse_args()
    try:
        if asked.readme:
            write_readme(asked.out)
        else:
            profile = Profile.load(asked.profile) if asked.profile else None
            evaluate(partial(contestants, profile=profile, tokens=asked.window, share=asked.share), asked)
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
