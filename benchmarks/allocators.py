"""Exact plans beside the published rules at equal true bytes, measured on SmolLM2-135M-Instruct.

    python -m benchmarks.allocators --profile profile.json                # scores all; resumable
    python -m benchmarks.allocators --profile profile.json --share 2/8    # every eighth, from the second on
    python -m benchmarks.allocators --readme                              # the table, from the results of all shares

Every rule makes a plan at each of 20 budgets from 2.2 to 6 true bits (KVmix's, which takes none, makes one), from the
formats, the sinks and the table of one profile, and the exact method makes one of no more bytes than that plan has.
Bytes are those at the windows' length, with a 16-bit compute dtype. KVTuner's search is the paper's (MOEA/D, 200
trials, widths of 2, 4 and 8 bits), but its trials measure the table's predicted loss, which the exact method knows too,
and not the model; once it starts at random as published, and once from the exact plans of its groups. A rule is left
out at budgets that it does not meet. Windows, scoring and intervals are those of `benchmarks/methods.py`.

Each share writes `<out>/share-2-of-8.jsonl`, finished pieces beside it, and every run prints what its results say: at
how many budgets no rule is better beyond doubt (a paired 95 % interval without 0), and the ratio of KL divergences at
2.5 to 3 bits, exact to the best published rule. `--readme` scores nothing: it writes the table between the two markers
in docs/search.md, and the records it is made of, with their blocks, to `benchmarks/allocators.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from benchmarks.methods import (
    FOLDER,
    comparable,
    evaluate,
    insert,
    interval,
    of_share,
    scoring_options,
)
from benchmarks.recipes import kept_record
from kvloom._extras import missing
from kvloom.allocate import Budget, KVTuner, StudySettings, allocate
from kvloom.errors import DataError, PlanError
from kvloom.evaluate import Contestant, Record, paired_difference, plan_contestant
from kvloom.plan import Plan
from kvloom.report import load_records
from kvloom.signals import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGETS = tuple(round(2.2 + 0.2 * n, 1) for n in range(20))
WARM = "kvtuner-warm"
BUDGETED = ("kvq", "kvtuner", WARM, "greedy")
PUBLISHED = ("kvmix", "kvq", "kvtuner")
TITLES = {
    "kvmix": "KVmix's rule",
    "kvq": "KVQ's rule",
    "kvtuner": "KVTuner's search",
    WARM: "the same from exact plans",
    "greedy": "greedy",
}
FEW_BITS = (2.5, 3.0)
"""True bits between which exact plans are to have at most 0.7 of the best published rule's KL divergence."""

TRIALS = 200
SCRIPT = "benchmarks/allocators.py"
DOCS = FOLDER.parent / "docs" / "search.md"
RESULTS = FOLDER / "results" / "allocators"
KEPT = FOLDER / "allocators.jsonl"
BEGIN, END = "<!-- allocators: written by benchmarks/allocators.py --readme -->", "<!-- /allocators -->"
UNMEASURED = (
    "Not measured yet: `python -m benchmarks.allocators --profile profile.json`, then `--readme`, puts the table here."
)
_DTYPE = "bfloat16"
_SEARCHES = (KVTuner.name, WARM)


@dataclass(frozen=True)
class Case:
    """A rule at a budget in true bits; None for the rule that takes none."""

    rule: str
    budget: float | None

    @property
    def name(self) -> str:
        """Name in the records."""
        return self.rule if self.budget is None else f"{self.rule} {self.budget:g}"

    def plan(self, profile: Profile, tokens: int) -> Plan:
        """The rule's plan.

        Raises:
            PlanError: the rule does not meet the budget.
        """
        budget = None if self.budget is None else Budget.bits(self.budget, tokens, _DTYPE)
        if self.rule not in _SEARCHES:
            return allocate(profile, budget, method=self.rule)
        search = KVTuner(settings=StudySettings(TRIALS, "moead"), warm=self.rule == WARM)
        return allocate(profile, budget, method=search)


CASES = (*(Case(rule, budget) for budget in BUDGETS for rule in BUDGETED), Case("kvmix", None))


def contestants(model: PreTrainedModel, profile: Profile, tokens: int, cases: Iterable[Case]) -> list[Contestant]:
    """The plans of the cases that can be made, and the exact plan at the bytes of each; equal ones once."""
    if absent := missing("search"):
        print(f"KVTuner's search is left out for lack of {' and '.join(absent)}.")
        cases = [case for case in cases if case.rule not in _SEARCHES]
    found: dict[str, Contestant] = {}
    for case in cases:
        try:
            plan = case.plan(profile, tokens)
        except PlanError as error:
            print(f"{case.name} is left out: {error}")
            continue
        nbytes = plan.nbytes(1, tokens, _DTYPE)
        exact = allocate(profile, Budget.memory(nbytes, 1, tokens, _DTYPE))
        rival = f"exact {exact.nbytes(1, tokens, _DTYPE)}"
        own = plan_contestant(
            plan, model, name=case.name, method=case.rule, target_bits=case.budget, prefill="quantized"
        )
        found[case.name] = replace(own, settings={"exact": rival})
        found[rival] = plan_contestant(exact, model, name=rival, method="exact", prefill="quantized")
    return list(found.values())


def score_share(asked: Any) -> None:
    """Score a share of the cases, and print what all results in the folder say."""
    profile, cases = Profile.load(asked.profile), of_share(CASES, asked.share)
    evaluate(partial(contestants, profile=profile, tokens=asked.window, cases=cases), asked)
    print(summary(pairs({record["name"]: record for record in load_records(asked.out)})))


@dataclass(frozen=True)
class Pair:
    """A rule's record and that of the exact plan at its bytes."""

    case: Case
    rule: Record
    exact: Record

    @property
    def compared(self) -> dict[str, dict[str, float]]:
        """Exact to rule; see `paired_difference`."""
        return paired_difference(self.exact, self.rule)

    @property
    def is_worse(self) -> bool:
        """Whether the exact plan has more divergence beyond doubt."""
        return self.compared["difference"]["low"] > 0

    @property
    def ratio(self) -> float:
        """Divergence of the exact plan to the rule's."""
        return self.compared["ratio"]["value"]


def pairs(rows: dict[str, Record]) -> list[Pair]:
    """All cases with results.

    Args:
        rows: records by name.

    Raises:
        DataError: there are none.
    """
    found = [
        Pair(case, rows[case.name], rows[rows[case.name]["settings"]["exact"]]) for case in CASES if case.name in rows
    ]
    if not found:
        raise DataError(f"There are no results of a rule: run {SCRIPT}.")
    return found


def summary(found: list[Pair]) -> str:
    """At how many budgets no rule is better, and the ratio at few bits."""
    budgets = sorted({pair.case.budget for pair in found if pair.case.budget is not None})
    worse = {pair.case.budget for pair in found if pair.is_worse}
    said = [
        f"Exact plans are better or tied at {sum(bits not in worse for bits in budgets)} of {len(budgets)} budgets."
    ]
    if own := [pair for pair in found if pair.case.budget is None]:
        said.append(f"At the bytes of KVmix's rule the ratio is {interval(own[0].compared['ratio'], '.2f')}.")
    few = _best_published(found)
    if few:
        mean = math.exp(sum(math.log(pair.ratio) for pair in few) / len(few))
        worst = max(few, key=lambda pair: pair.ratio)
        said.append(
            f"From {FEW_BITS[0]:g} to {FEW_BITS[1]:g} true bits their KL divergence is {mean:.2f} of the best "
            f"published rule's (geometric mean of {len(few)} budgets; at most "
            f"{interval(worst.compared['ratio'], '.2f')}, beside {TITLES[worst.case.rule]} at {worst.case.budget:g})."
        )
    return " ".join(said)


def _best_published(found: list[Pair]) -> list[Pair]:
    """At every budget of few bits, the published rule of the least divergence."""
    best: dict[float, Pair] = {}
    for pair in found:
        bits = pair.case.budget
        if pair.case.rule in PUBLISHED and bits is not None and FEW_BITS[0] <= bits <= FEW_BITS[1]:
            known = best.get(bits, pair)
            best[bits] = min(known, pair, key=lambda it: it.rule["kld"]["value"])
    return list(best.values())


def table(found: list[Pair]) -> str:
    """The markdown table, and what must be known to read it."""
    cells = {(pair.case.budget, pair.case.rule): _cell(pair) for pair in found}
    rules = [rule for rule in TITLES if any(pair.case.rule == rule for pair in found)]
    budgets = list(dict.fromkeys(pair.case.budget for pair in found))
    lines = [
        f"| budget | {' | '.join(TITLES[rule] for rule in rules)} |",
        "|---" * (len(rules) + 1) + "|",
        *(f"| {_bits(bits)} | {' | '.join(cells.get((bits, rule), '') for rule in rules)} |" for bits in budgets),
    ]
    return "\n".join([*lines, "", _legend(found)])


def _bits(budget: float | None) -> str:
    return "none" if budget is None else f"{budget:g}"


def _cell(pair: Pair) -> str:
    ratio = interval(pair.compared["ratio"], ".2f")
    return f"{pair.rule['kld']['value']:#.3g}, {pair.exact['kld']['value']:#.3g}: {ratio}"


def _legend(found: list[Pair]) -> str:
    record = found[0].rule
    said = (
        f"{record['model']}, {record['dtype']}, device: {record['device']}; {record['scored_tokens']:,} scored tokens "
        f"of real text in {record['windows']} windows of {record['context']:,}. Every cell has the rule's KL "
        "divergence from the uncompressed cache, in nats a token, that of the exact plan of no more bytes, and their "
        "ratio (exact to rule, with its paired 95 % interval: below 1 the exact plan is better). Budgets are in true "
        f"bits at the windows' length. All plans have the formats, sinks and table of one profile. {summary(found)}"
    )
    return fill(said, 140, break_on_hyphens=False)


def write_docs(results: Path, docs: Path = DOCS, kept: Path = KEPT) -> None:
    """Write the table between the markers, and keep what it is made of.

    Raises:
        DataError: see `comparable`, `pairs` and `between`.
    """
    rows = comparable(results, ["greedy 3"], SCRIPT)
    insert(docs, table(pairs(rows)), BEGIN, END)
    kept.write_text("".join(json.dumps(kept_record(record)) + "\n" for record in rows.values()), encoding="utf-8")


def main() -> None:
    """Score a share, or write the table."""
    parser = scoring_options(__doc__.split("\n")[0], RESULTS)
    parser.add_argument("--profile", type=Path, help="made by `kvloom profile`")
    asked = parser.parse_args()
    try:
        if asked.readme:
            write_docs(asked.out)
        elif asked.profile is None:
            raise DataError("--profile is missing: give a file made by `kvloom profile`.")
        else:
            score_share(asked)
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
