"""The tables of docs/eviction.md: at equal true bytes, many tokens of few bits or few tokens of many.

    python -m benchmarks.tokens_or_bits                 # scores all; resumable
    python -m benchmarks.tokens_or_bits --share 2/8     # every eighth of them from the second on: processes share a GPU
    python -m benchmarks.tokens_or_bits --readme        # tables and picture, from the results of all shares

The experiment of QPruningKV ("More Tokens, Lower Precision", arXiv 2412.12706) with bytes that are true ones: scales,
zero points, exact tokens, unfilled pages, sums of attention and the places of kept tokens count, so that 2 bits never
buy eight times the tokens. 2-bit keys have groups along tokens, which it did not try. Each share writes
`<out>/share-2-of-8.jsonl`, finished pieces beside it. `--readme` scores nothing: it writes the tables between the two
markers, the picture beside the page, and the records they are made of to `benchmarks/tokens_or_bits.jsonl` (a test
holds the page to them; after a change of words, `--readme --out benchmarks/tokens_or_bits.jsonl` makes it again).

A budget is a share of the bytes of the prompt's uncompressed 16-bit cache. Within it every plan keeps as many tokens as
fit; a format whose plan fits without eviction is scored so, once for all policies. All plans keep four sinks exactly,
policies have the parameters of QPruningKV's scripts (AdaKV those of SnapKV, whose scores it takes), and policies that
know no newest tokens are given the same eight. Three scores: KL divergence of the tokens decoded after the prompt, one
by one (`kvloom.evaluate.Protocol(prompt=True)`), needles in prompts of the same length, and answers to questions on
documents of that length (`benchmarks/essay_qa.py`, scored as LongBench scores them: F1 of words).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Self

from benchmarks.essay_qa import SET, write_rows
from benchmarks.methods import (
    FOLDER,
    FOUR,
    comparable,
    insert,
    interval,
    of_share,
    printed,
    scoring_options,
    share_file,
    without_blocks,
)
from kvloom._extras import require
from kvloom.assets import EVALUATION, MODEL_NAME, load_model, texts, token_windows
from kvloom.errors import DataError
from kvloom.evaluate import (
    Contestant,
    Protocol,
    Record,
    Settings,
    Task,
    choose,
    dense_contestant,
    evaluate,
    fidelity,
    needle,
    needle_cases,
    plan_contestant,
)
from kvloom.eviction import preset as eviction_preset
from kvloom.plan import Fingerprint, Plan, Window, evict_to_bytes, preset
from kvloom.report import load_records, render_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel

BUDGETS = (64, 32, 16, 8, 4, 2)
"""One so-manieth of the uncompressed bytes."""

DTYPE = "bfloat16"
PROMPT = 2048
SCORED = 128
WINDOWS = 32
LEAST_TOKENS = 4096
SEEDS = range(6)
DOCUMENT = 1950
"""Tokens of a document and its question; with what is around them prompts of SmolLM2 have 2,018."""
DENSE = "dense"
EIGHT = Window(sinks=4, recent=8)

SCRIPT = "benchmarks/tokens_or_bits.py"
RESULTS = FOLDER / "results" / "tokens_or_bits"
KEPT = FOLDER / "tokens_or_bits.jsonl"
PAGE = FOLDER.parent / "docs" / "eviction.md"
BEGIN, END = f"<!-- tokens or bits: written by {SCRIPT} --readme -->", "<!-- /tokens or bits -->"
UNMEASURED = (
    "Not measured yet: `python -m benchmarks.tokens_or_bits`, then the same with `--readme`, puts tables and a picture "
    "here."
)


@dataclass(frozen=True)
class Kept:
    """A policy as it is run here."""

    policy: str
    parameters: Mapping[str, Any]
    window: Window = FOUR


def _as_scripts(name: str) -> Kept:
    return Kept(*eviction_preset(f"qpruningkv/{name}"))


PUBLISHED = (
    *map(_as_scripts, ("streaming_llm", "h2o", "snapkv", "pyramidkv")),
    Kept("adakv", _as_scripts("snapkv").parameters),
    Kept("key_norm", {}, EIGHT),
    Kept("expected_attention", {}, EIGHT),
)
FORMATS: Mapping[str, Callable[[Fingerprint], Plan]] = {
    "16 bits": partial(Plan.uniform, key_bits=16, value_bits=16),
    **{f"K{bits}V{bits}": partial(Plan.uniform, key_bits=bits, value_bits=bits) for bits in (8, 4, 2)},
    **{name: partial(preset, name) for name in ("kvloom/K4V4", "kvloom/K2V2")},
}
"""Name -> plan that keeps every token. Uniform keys have groups along tokens, values along channels."""


def name_of(policy: str, budget: int, stored: str) -> str:
    """Name of a contestant that evicts; one that does not has the name of its format."""
    return f"{policy}, 1/{budget}, {stored}"


def plans(model: Fingerprint, prompt: int) -> dict[str, Plan]:
    """Every plan by name, those that keep all tokens last.

    Raises:
        PlanError: a budget of the prompt's bytes is too small for what a policy never evicts.
    """
    wholes = {stored: in_window(make(model), FOUR) for stored, make in FORMATS.items()}
    found = {
        name_of(kept.policy, budget, stored): evict_to_bytes(
            in_window(whole, kept.window),
            kept.policy,
            prompt // budget,
            parameters=kept.parameters,
            dtype=DTYPE,
            tokens=prompt,
        )
        for kept in PUBLISHED
        for budget in BUDGETS
        for stored, whole in wholes.items()
        if not _fits(whole, prompt, budget)
    }
    return found | {stored: whole for stored, whole in wholes.items() if _fits(whole, prompt, min(BUDGETS))}


def in_window(plan: Plan, window: Window) -> Plan:
    """The plan with another window in every layer."""
    entries = tuple(entry.model_copy(update={"window": window}) for entry in plan.layers)
    return plan.model_copy(update={"layers": entries})


def _fits(plan: Plan, prompt: int, budget: int) -> bool:
    """Whether a plan has at most the budget's bytes when it holds the prompt."""
    return budget * plan.true_bits(prompt, DTYPE) <= 16


def contestants(model: PreTrainedModel, prompt: int) -> list[Contestant]:
    """The uncompressed cache and every plan."""
    packed = plans(Fingerprint.of(model), prompt)
    own = [
        plan_contestant(plan, model, name=name, method="uniform+sinks", prefill="exact")
        for name, plan in packed.items()
    ]
    return [dense_contestant(model), *own]


def score(asked: argparse.Namespace, lineup: Callable[[PreTrainedModel, int], Sequence[Contestant]]) -> None:
    """Score a share: divergence after prompts, needles in them, and answers.

    On a GPU in float16, which the fused kernels read; rounding of the model's sums then adds some 2e-5 nats.

    Args:
        asked: options of `scoring_options`.
        lineup: contestants for a model and the tokens of its prompts.
    """
    dtype = "float32" if asked.device == "cpu" else "float16"
    model, tokenizer = load_model(MODEL_NAME, device=asked.device, dtype=dtype)
    read = texts(EVALUATION)
    prompt = asked.window - SCORED - 1
    own = of_share(lineup(model, prompt), asked.share)
    shared: dict[str, Any] = {"out": share_file(asked), "batch": asked.batch, "progress": printed()}
    records = fidelity(
        model,
        token_windows(tokenizer, read, asked.window, asked.windows, seed=0),
        own,
        protocol=Protocol(chunk=1, unscored=prompt, prompt=True),
        texts=EVALUATION,
        **shared,
    )
    haystack = "\n".join(text.content for text in read)
    records += needle(model, tokenizer, haystack, own, cases=needle_cases([prompt], seeds=SEEDS), **shared)
    records += evaluate(model, tokenizer, questions(asked.out / "data", tokenizer, prompt), own, **shared)
    print(render_text(records))


def questions(folder: Path, tokenizer: Any, prompt: int) -> Sequence[Task]:
    """Questions on documents of the essays, whose prompts have at most so many tokens; `folder` keeps the rows."""
    write_rows(folder, tokenizer, DOCUMENT)
    return choose([f"longbench/{SET}"], Settings(data=folder, lengths=(prompt,))).tasks


@dataclass(frozen=True)
class AfterPrompts:
    """Records by name: of divergence, of needles in the same prompts, and of questions on documents as long.

    Attributes:
        scores: of divergence.
        needles: of needles.
        answers: of questions.
    """

    scores: Mapping[str, Record]
    needles: Mapping[str, Record]
    answers: Mapping[str, Record]

    @classmethod
    def read(cls, results: Path, needed: Sequence[str], script: str) -> Self:
        """The newest results that compare with each other, of all that shares have written.

        Args:
            results: their folder.
            needed: names besides the uncompressed cache without which there is no table.
            script: who writes them.

        Raises:
            DataError: see `comparable`; or a contestant has no needles or no answers.
        """
        scores = comparable(results, (DENSE, *needed), script, LEAST_TOKENS)
        same = {key: scores[DENSE][key] for key in ("model", "device", "dtype")}
        others = [it for it in load_records(results) if it["kind"] in ("needle", "task") and same.items() <= it.items()]
        others.sort(key=lambda record: str(record["when"]))
        needles, answers = ({it["name"]: it for it in others if it["kind"] == kind} for kind in ("needle", "task"))
        if missing := sorted(scores.keys() - (needles.keys() & answers.keys())):
            raise DataError(f"{results} has no needles or no answers of {missing[0]}: run {script} to its end.")
        return cls(scores, needles, answers)

    @property
    def hits_and_answers(self) -> Iterator[Record]:
        """Records of needles and questions without their cases."""
        for record in (*self.needles.values(), *self.answers.values()):
            yield {key: value for key, value in record.items() if key != "cases"}

    def hits(self, name: str) -> str:
        """Needles and answers of a contestant, as cells have them."""
        found = self.needles[name]
        return f"{found['found']}/{found['total']}; {float(self.answers[name]['score']['value']):.2f}"


class Results(AfterPrompts):
    """What the tables and the picture show."""

    @classmethod
    def load(cls, results: Path) -> Results:
        """The newest results and those that compare with them.

        Raises:
            DataError: see `AfterPrompts.read`; or a cell of the tables has no results.
        """
        found = cls.read(results, (), SCRIPT)
        names = {found.name(kept.policy, budget, stored) for kept, budget, stored in _cells()}
        if missing := sorted(names - found.scores.keys()):
            raise DataError(f"{results} has no results of {missing[0]}: run {SCRIPT} to its end.")
        return found

    @property
    def records(self) -> Iterator[Record]:
        """What tables and picture are made of."""
        yield from map(without_blocks, self.scores.values())
        yield from self.hits_and_answers

    def name(self, policy: str, budget: int, stored: str) -> str:
        """Of the contestant that stands in a cell: one that keeps all tokens, if it is within the budget."""
        whole = self.scores.get(stored)
        return stored if whole and budget * whole["true_bits"] <= 16 else name_of(policy, budget, stored)


def _cells() -> Iterator[tuple[Kept, int, str]]:
    for kept in PUBLISHED:
        for budget in BUDGETS:
            for stored in FORMATS:
                yield kept, budget, stored


def body(found: Results, picture: str) -> str:
    """The picture, a table for each policy, and what must be known to read them."""
    tables = [_table(found, kept.policy) for kept in PUBLISHED]
    return "\n\n".join([f"![Divergence and needles over bytes, for each policy]({picture})", *tables, _legend(found)])


def _table(found: Results, policy: str) -> str:
    heads = [f"`{policy}`", *(f"`{stored}`" if "/" in stored else stored for stored in FORMATS)]
    lines = [heads, ["---"] * len(heads), *(_line(found, policy, budget) for budget in BUDGETS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(found: Results, policy: str, budget: int) -> list[str]:
    names = [found.name(policy, budget, stored) for stored in FORMATS]
    best = min(names, key=lambda name: float(found.scores[name]["kld"]["value"]))
    return [f"1/{budget}", *(_cell(found, name, name == best) for name in names)]


def _cell(found: Results, name: str, is_best: bool) -> str:
    value, mark = interval(found.scores[name]["kld"], "#.3g"), "**" * is_best
    return f"{mark}{value}{mark}; {found.hits(name)}{' (all tokens)' * (name in FORMATS)}"


def _legend(found: Results) -> str:
    record, asked, answered = (them[DENSE] for them in (found.scores, found.needles, found.answers))
    said = (
        f"{record['model']}, {record['dtype']}, device: {record['device']}. First column: bytes at most, as a share of "
        f"the uncompressed 16-bit cache of a prompt of {record['prompt']:,} tokens, all that is resident counted. "
        "Cells: KL divergence from the uncompressed cache, in nats a token with its 95 % interval, of "
        f"{record['scored_tokens']:,} tokens decoded after the prompts of {record['windows']} windows of real text "
        "(bold: the least of a line); needles found in prompts of the same length, of which the uncompressed cache "
        f"finds {asked['found']} of {asked['total']}; and the mean F1 of answers to {answered['total']} questions on "
        f"documents about as long, {answered['score']['value']:.2f} by the uncompressed cache. (all tokens): the "
        "format is within the budget without eviction. "
        "Keys and values of 2 to 8 bits are packed in pages of 64 tokens, keys with a scale and a zero point for each "
        "channel of a page, values for each token; tokens that fill no page stay at 16 bits, so that budgets of few "
        "tokens buy few packed ones. Names in `code` are presets: rotated, with searched clip ranges."
    )
    return fill(said, 120, break_on_hyphens=False)


_ROWS = ("KL divergence, nats a token", "needles found", "F1 of answers")


def draw(found: Results, path: Path) -> None:
    """Divergence, needles and answers over the budget, a column for each policy.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("plot", "The picture of tokens or bits")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(PUBLISHED), 9), layout="constrained")
    grid = figure.subplots(len(_ROWS), len(PUBLISHED), sharex=True, sharey="row", squeeze=False)
    for column, kept in zip(grid.T, PUBLISHED, strict=True):
        column[0].set(title=kept.policy, xscale="log", yscale="log")
        column[1].set(ylim=(-0.05, 1.05))
        column[-1].set(xlabel="share of the uncompressed bytes")
        _lines(found, kept.policy, column)
    for axes, said in zip(grid[:, 0], _ROWS, strict=True):
        axes.set(ylabel=said)
    grid[-1][0].set_xticks([1 / budget for budget in BUDGETS], [f"1/{budget}" for budget in BUDGETS], minor=False)
    grid[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=90)


def _lines(found: Results, policy: str, column: Sequence[Axes]) -> None:
    budgets = [1 / budget for budget in BUDGETS]
    shown = zip(column, (found.scores, found.needles, found.answers), ("kld", "score", "score"), strict=True)
    for axes, records, key in shown:
        for stored in FORMATS:
            points = [records[found.name(policy, budget, stored)][key] for budget in BUDGETS]
            (line,) = axes.plot(budgets, [it["value"] for it in points], marker="o", markersize=3, label=stored)
            low, high = [it["low"] for it in points], [it["high"] for it in points]
            axes.fill_between(budgets, low, high, alpha=0.1, color=line.get_color(), linewidth=0)
        axes.grid(alpha=0.2)
        axes.tick_params(which="minor", axis="x", bottom=False, labelbottom=False)


def write_page(results: Path, page: Path = PAGE, kept: Path = KEPT) -> None:
    """Write the tables between the markers, the picture beside the page, and keep what they are made of.

    Raises:
        DataError: see `Results.load` and `between`.
        MissingExtraError: matplotlib is not installed.
    """
    found, picture = Results.load(results), page.with_suffix(".png")
    draw(found, picture)
    insert(page, body(found, picture.name), BEGIN, END)
    kept.write_text("".join(json.dumps(record) + "\n" for record in found.records), encoding="utf-8")


def main() -> None:
    """Score a share, or write the page."""
    parser = scoring_options(__doc__.split("\n")[0], RESULTS)
    parser.set_defaults(windows=WINDOWS, window=PROMPT + SCORED + 1)
    asked = parser.parse_args()
    try:
        if asked.readme:
            write_page(asked.out)
        else:
            score(asked, contestants)
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
