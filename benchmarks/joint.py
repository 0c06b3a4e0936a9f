"""The table of docs/eviction.md: plans of tokens and bits together beside every policy with uniform bits.

    kvloom profile smollm2-135m --rotated --evict auto --evict-prompts 16 -o profile.json
    python -m benchmarks.joint --profile profile.json               # scores all; resumable
    python -m benchmarks.joint --profile profile.json --share 2/8   # every eighth of them from the second on
    python -m benchmarks.joint --readme                             # the table, from the results of all shares

The grid is that of `benchmarks/tokens_or_bits.py`, each of its policies with each of its formats, at 5 % and 12.5 % of
the bytes of a prompt's uncompressed 16-bit cache; besides, kvloom's own policy and formats of 3 bits. Joint plans have
at most the same bytes: every layer may take any of the profile's policies (`joint, auto`), or all that evict take one
of them. Scores are those of that script, too. The best grid point is the one of the least divergence on the very tokens
that it is compared on, which favours it: one of those published (their policies, 16, 8, 4 and 2 bits), one of all.

Each share writes `<out>/share-2-of-8.jsonl`, finished pieces beside it. `--readme` scores nothing: it writes the table
between two markers, and the records it is made of to `benchmarks/joint.jsonl` (a test holds the page to them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.methods import FOLDER, insert, interval, scoring_options
from benchmarks.tokens_or_bits import (
    DENSE,
    DTYPE,
    FORMATS,
    PAGE,
    PROMPT,
    PUBLISHED,
    SCORED,
    WINDOWS,
    AfterPrompts,
    Kept,
    in_window,
    score,
)
from kvloom.allocate import Budget, Joint, allocate
from kvloom.errors import DataError
from kvloom.evaluate import (
    Contestant,
    Record,
    dense_contestant,
    paired_difference,
    plan_contestant,
)
from kvloom.plan import Fingerprint, Plan, evict_to_bytes, preset
from kvloom.signals import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGETS = (0.05, 0.125)
"""Shares of the uncompressed bytes."""

POLICIES = (*PUBLISHED, Kept("snap_expected", {}))
GRID: Mapping[str, Callable[[Fingerprint], Plan]] = {
    **FORMATS,
    "K3V3": partial(Plan.uniform, key_bits=3, value_bits=3),
    "kvloom/K3V3": partial(preset, "kvloom/K3V3"),
}

UNIFORM = tuple(name for name in FORMATS if "/" not in name)

SCRIPT = "benchmarks/joint.py"
RESULTS = FOLDER / "results" / "joint"
KEPT = FOLDER / "joint.jsonl"
BEGIN, END = f"<!-- joint: written by {SCRIPT} --readme -->", "<!-- /joint -->"
UNMEASURED = (
    "Not measured yet: `python -m benchmarks.joint --profile profile.json`, then `--readme`, puts the table here."
)


def grid_name(policy: str, budget: float, stored: str) -> str:
    """Name of a grid point."""
    return f"{policy}, {100 * budget:g} %, {stored}"


def joint_name(policy: str, budget: float) -> str:
    """Name of a joint plan."""
    return f"joint, {100 * budget:g} %, {policy}"


def grid(model: Fingerprint, prompt: int) -> dict[str, Plan]:
    """Every policy with every format at every budget.

    Raises:
        PlanError: a budget is too small for what a policy never evicts.
    """
    return {
        grid_name(kept.policy, budget, stored): evict_to_bytes(
            in_window(make(model), kept.window),
            kept.policy,
            int(budget * prompt),
            parameters=kept.parameters,
            dtype=DTYPE,
            tokens=prompt,
        )
        for budget in BUDGETS
        for kept in POLICIES
        for stored, make in GRID.items()
    }


def joint(profile: Profile, prompt: int) -> dict[str, Plan]:
    """The joint plan of every budget and policy, and of all policies.

    Raises:
        PlanError: the profile has no losses of evictions.
    """
    model = profile.model
    row = 2 * len(model.packed_layers) * model.num_kv_heads * model.head_dim * 2
    policies = ("auto", *(profile.eviction.policies if profile.eviction else ()))
    return {
        joint_name(policy, budget): allocate(
            profile, Budget.memory(int(budget * prompt) * row, 1, prompt, DTYPE), method=Joint(policy)
        )
        for budget in BUDGETS
        for policy in policies
    }


def contestants(profile: Profile, model: PreTrainedModel, prompt: int) -> list[Contestant]:
    """The uncompressed cache, joint plans and the grid."""
    own = [
        plan_contestant(plan, model, name=name, method=method, prefill="exact")
        for method, plans in (("joint", joint(profile, prompt)), ("grid", grid(Fingerprint.of(model), prompt)))
        for name, plan in plans.items()
    ]
    return [dense_contestant(model), *own]


class Results(AfterPrompts):
    """What the table shows."""

    @classmethod
    def load(cls, results: Path) -> Results:
        """The newest results and those that compare with them.

        Raises:
            DataError: see `AfterPrompts.read`.
        """
        needed = [joint_name("auto", budget) for budget in BUDGETS]
        needed += [grid_name(kept.policy, budget, stored) for budget in BUDGETS for kept in POLICIES for stored in GRID]
        return cls.read(results, needed, SCRIPT)

    def best(self, budget: float, policies: Iterable[Kept] = POLICIES, stored: Iterable[str] = tuple(GRID)) -> Record:
        """The grid point of the least divergence."""
        names = [grid_name(kept.policy, budget, each) for kept, each in product(policies, stored)]
        return min((self.scores[name] for name in names), key=lambda record: float(record["kld"]["value"]))

    def best_published(self, budget: float) -> Record:
        """The same of published policies with 16, 8, 4 and 2 bits."""
        return self.best(budget, PUBLISHED, UNIFORM)

    def joint(self, budget: float) -> list[Record]:
        """Joint plans, `auto` first."""
        first, rest = joint_name("auto", budget), joint_name("", budget)
        others = [record for name, record in self.scores.items() if name.startswith(rest) and name != first]
        return [self.scores[first], *sorted(others, key=lambda record: str(record["name"]))]


def body(found: Results) -> str:
    """The table, and what must be known to read it."""
    lines = [
        "| bytes | plan | KLD [95 %] | ratio to the best published [95 %] | to the best of the grid | needles; F1 |",
        "|---|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        bests = {"published": found.best_published(budget), "of the grid": found.best(budget)}
        lines += [_line(found, budget, f"best {said}: ", best, ()) for said, best in bests.items()]
        lines += [_line(found, budget, "", record, bests.values()) for record in found.joint(budget)]
    return "\n".join([*lines, "", _legend(found)])


def _line(found: Results, budget: float, said: str, record: Record, bests: Iterable[Record]) -> str:
    share = f"{100 * budget:g} %"
    ratios = [interval(paired_difference(record, best)["ratio"], ".2f") for best in bests] or ["", ""]
    name, kld = record["name"].replace(f" {share},", ""), interval(record["kld"], "#.3g")
    return f"| {' | '.join([share, said + name, kld, *ratios, found.hits(record['name'])])} |"


def _legend(found: Results) -> str:
    record, asked, answered = (them[DENSE] for them in (found.scores, found.needles, found.answers))
    said = (
        f"{record['model']}, {record['dtype']}, device: {record['device']}. Bytes at most, as a share of the "
        f"uncompressed 16-bit cache of a prompt of {record['prompt']:,} tokens, all that is resident counted. KL "
        f"divergence from the uncompressed cache, in nats a token, of {record['scored_tokens']:,} tokens decoded after "
        f"the prompts of {record['windows']} windows of real text; ratios are on the same draws of tokens. Best "
        f"published: the least of {len(PUBLISHED) * len(UNIFORM)} points on these very tokens, {len(PUBLISHED)} "
        f"published policies with 16, 8, 4 or 2 bits; best of the grid: of {len(POLICIES) * len(GRID)}, with kvloom's "
        "policy, 3 bits, and rotated formats with searched clip ranges, too. Needles in "
        f"prompts of the same length, of which the uncompressed cache finds {asked['found']} of {asked['total']}; F1 "
        f"of answers to {answered['total']} questions on documents about as long, {answered['score']['value']:.2f} by "
        "the uncompressed cache."
    )
    return fill(said, 120, break_on_hyphens=False)


def write_page(results: Path, page: Path = PAGE, kept: Path = KEPT) -> None:
    """Write the table between the markers, and keep what it is made of.

    Raises:
        DataError: see `Results.load` and `between`.
    """
    found = Results.load(results)
    insert(page, body(found), BEGIN, END)
    records = [*({**it, "layers": None} for it in found.scores.values()), *found.hits_and_answers]
    kept.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Score a share, or write the page."""
    parser = scoring_options(__doc__.split("\n")[0], RESULTS)
    parser.add_argument("--profile", type=Path, help="made with --evict; what joint plans are made of")
    parser.set_defaults(windows=WINDOWS, window=PROMPT + SCORED + 1)
    asked = parser.parse_args()
    try:
        if asked.readme:
            write_page(asked.out)
        elif asked.profile is None:
            raise DataError("joint plans are made of a profile: give --profile.")
        else:
            score(asked, partial(contestants, Profile.load(asked.profile)))
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
