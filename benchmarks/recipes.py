"""The table of recipes in README.md: the best uniform plan within a budget beside the best public package.

    python -m benchmarks.recipes                  # scores all; resumable
    python -m benchmarks.recipes --share 2/8      # every eighth of them, from the second on: processes share a GPU
    python -m benchmarks.recipes --readme         # the table, from the results of all shares and of methods.py

Windows, scoring and intervals are those of `benchmarks/methods.py`. Packages: transformers' `QuantizedCache`, and those
of `benchmarks/packages.py`, which says how to install them. Each share writes `<out>/share-2-of-8.jsonl`, finished
pieces beside it. `--readme` scores nothing: it writes the table between the two markers in README.md, and the records,
with the blocks of the compared ones, to `benchmarks/recipes.jsonl` (a test holds README.md to them; after a change of
words, `--readme --out benchmarks/recipes.jsonl` makes the table again). It reads all results below `benchmarks/results`
and takes the recipes, the uniform plans of `methods.py` that keep four sinks, and the packages.

Within a budget are plans of at most so many true bits, sinks and the unfilled page included, and packages of at most
1/16 bit more, so that a format of just the budget is not shut out by the 7 tokens that `QuantizedCache` keeps exactly
here. Each side is represented by its lowest KLD.

Recipes have pages of at most 128 tokens, so that on average no more than 64 of the newest tokens are read exactly, as
many as in the passes of 128 tokens in which `QuantizedCache` is scored. Groups of 256 tokens would flatter: up to 255
of the newest tokens would wait exactly for their page, and bits are counted where only 7 do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from benchmarks.methods import (
    FOLDER,
    FOUR,
    METHODS,
    PAGE,
    README,
    comparable,
    evaluate,
    insert,
    interval,
    of_share,
    scoring_options,
    without_blocks,
)
from benchmarks.packages import PACKAGES, package_contestants
from kvloom.errors import DataError
from kvloom.evaluate import Contestant, Record, paired_difference, peer_contestants, plan_contestant
from kvloom.plan import Fingerprint, Plan, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGETS = (2.25, 2.5, 2.75, 3.25, 4.25)
ALLOWANCE = 1 / 16
"""True bits that a package may have above a budget."""

SCRIPT = "benchmarks/recipes.py"
RESULTS = FOLDER / "results" / "recipes"
KEPT = FOLDER / "recipes.jsonl"
BEGIN, END = "<!-- recipes: written by benchmarks/recipes.py --readme -->", "<!-- /recipes -->"
UNMEASURED = "Not measured yet: `python -m benchmarks.recipes`, then the same with `--readme`, puts the table here."


@dataclass(frozen=True)
class Recipe:
    """Formats of keys and values, the same in every layer, with four sinks."""

    key: TensorSpec
    value: TensorSpec

    @property
    def name(self) -> str:
        """Name in the table and the records."""
        return f"{self.key.label}; {self.value.label}"

    def plan(self, model: Fingerprint) -> Plan:
        """The recipe as a plan."""
        return Plan.from_specs(model, dict.fromkeys(model.packed_layers, (self.key, self.value)), window=FOUR)


def _side(label: str, symmetric: bool = False) -> TensorSpec:
    """A rotated format by the label of its bits, groups and codec."""
    bits, groups, codec = label.split("/")
    per_channel = groups.startswith("ch")
    return TensorSpec.model_validate(
        {
            "codec": codec,
            "bits": int(bits.removesuffix("b")),
            "grouping": "per_channel" if per_channel else "per_token",
            "group_size": int(groups.removeprefix("ch")) if per_channel else "head_dim",
            "symmetric": symmetric or codec == "lloyd",
            "rotation": "hadamard",
        }
    )


RECIPES = (
    Recipe(_side("2b/ch128/clipped"), _side("2b/ch128/lloyd")),
    Recipe(_side("2b/ch128/clipped"), _side("2b/tok-head/clipped")),
    Recipe(_side("3b/ch128/clipped", symmetric=True), _side("2b/tok-head/clipped", symmetric=True)),
    Recipe(_side("3b/ch128/clipped", symmetric=True), _side("3b/tok-head/clipped", symmetric=True)),
    Recipe(_side("3b/ch128/clipped"), _side("3b/ch128/lloyd")),
    Recipe(_side("4b/ch128/clipped"), _side("4b/ch128/lloyd")),
)


OWN = {recipe.name for recipe in RECIPES} | {method.name for method in METHODS if method.exact == "first 4"}
"""Uniform plans with four sinks."""


def contestants(model: PreTrainedModel) -> list[Contestant]:
    """Every recipe, and every setting of a package that can run here and may be within a budget."""
    shape = Fingerprint.of(model)
    recipes = [
        plan_contestant(recipe.plan(shape), model, name=recipe.name, method="uniform+sinks", prefill="quantized")
        for recipe in RECIPES
    ]
    peers, packages = peer_contestants(model, bits=(2, 3, 4), groups=(32, 64, 128)), package_contestants(model)
    for note in (*peers.notes, *packages.notes):
        print(note)
    return [*recipes, *(peer for peer in peers.contestants if _is_wanted(peer)), *packages.contestants]


def _is_wanted(peer: Contestant) -> bool:
    """Whether `QuantizedCache` has its best axes at this width, and may be within the largest budget."""
    bits, group = (peer.settings[name] for name in ("nbits", "q_group_size"))
    assert isinstance(bits, int)
    assert isinstance(group, int)
    return ("best axes" in peer.name or bits == 3) and bits + 32 / group <= max(BUDGETS)


@dataclass(frozen=True)
class Row:
    """A budget, and the best of each side within it."""

    budget: float
    ours: Record
    theirs: Record


def best(rows: dict[str, Record]) -> list[Row]:
    """The rows of the table.

    Args:
        rows: records by name.

    Raises:
        DataError: a budget has no recipe or no package within it.
    """
    ours, theirs = ([record for record in rows.values() if _is_ours(record) == own] for own in (True, False))
    return [
        Row(budget, _best(ours, budget, "uniform plan"), _best(theirs, budget + ALLOWANCE, "package"))
        for budget in BUDGETS
    ]


def _is_ours(record: Record) -> bool:
    return record["name"] in OWN


def _is_compared(record: Record) -> bool:
    return _is_ours(record) or not {"backend", "package"}.isdisjoint(record["settings"])


def _best(records: list[Record], bits: float, kind: str) -> Record:
    within = [record for record in records if record["true_bits"] <= bits]
    if not within:
        raise DataError(f"No {kind} has results at {bits:g} true bits or fewer: run {SCRIPT} to its end.")
    return min(within, key=lambda record: record["kld"]["value"])


def table(rows: dict[str, Record]) -> str:
    """The markdown table, and what must be known to read it."""
    lines = [
        "| budget | uniform plan | true bits | KLD [95 %] | best public package | true bits | KLD [95 %] "
        "| ratio [95 %] |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in best(rows)),
    ]
    return "\n".join([*lines, "", _legend(rows)])


def _line(row: Row) -> str:
    cells = [
        f"{row.budget:g}",
        f"`{row.ours['name']}`",
        *_measured(row.ours),
        _package(row.theirs),
        *_measured(row.theirs),
        interval(paired_difference(row.ours, row.theirs)["ratio"], ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def _package(record: Record) -> str:
    backend = record["settings"].get("backend")
    return f"`QuantizedCache`, {record['name']}" if backend else record["name"]


def _measured(record: Record) -> tuple[str, str]:
    stated = " (stated)" if record["settings"].get("stated") else ""
    return f"{record['true_bits']:.2f}{stated}", interval(record["kld"], "#.3g")


def _legend(rows: dict[str, Record]) -> str:
    record = next(iter(rows.values()))
    tokens, ours = record["context"], sum(map(_is_ours, rows.values()))
    said = (
        f"{record['model']}, {record['dtype']}, device: {record['device']}; {record['scored_tokens']:,} scored tokens "
        f"of real text in {record['windows']} windows. True bits are those at {tokens:,} tokens "
        f"({tokens // PAGE} pages and {tokens % PAGE} tokens), with a 16-bit compute dtype; ours are at most the "
        f"budget, a package's at most {ALLOWANCE:g} more. KLD is from the uncompressed cache, in nats a token; ratios "
        "are ours to theirs on the same draws of tokens. Ours are the same in every layer, with four sinks; those with "
        "names of their own are in the table of methods. `2b/ch128` is 2 bits in groups of 128 tokens of a channel, "
        "`tok-head` of all channels of a token, `s` without zero points. Pages have as many tokens as the largest "
        "group, 64 at least, and the newest tokens are exact until theirs is full. Each side is its best of "
        f"{ours} uniform plans and of {len(rows) - ours} settings of {_packages(rows)}{_absent(rows)}. "
        "`QuantizedCache` has the axes that measured best; it, and packages that keep the newest tokens exactly, show "
        f"a pass of {record['chunk']} tokens its own ones exactly, all others as stored. Bits (stated) are the "
        "package's own figure: it holds floats, or a byte a code."
    )
    return fill(said, 120, break_on_hyphens=False)


def _packages(rows: dict[str, Record]) -> str:
    """Names and versions, in the order of the records."""
    settings = [record["settings"] for record in rows.values()]
    known = dict.fromkeys(f"{own['package']} {own['version']}" for own in settings if own.get("package") in PACKAGES)
    backends = dict.fromkeys(f"`QuantizedCache` on {own['backend']}" for own in settings if "backend" in own)
    return ", ".join([*backends, *known])


def _absent(rows: dict[str, Record]) -> str:
    """Packages and recipes that have no results here."""
    found = {record["settings"].get("package") for record in rows.values()}
    recipes = sum(recipe.name not in rows for recipe in RECIPES)
    absent = [*sorted(PACKAGES.keys() - found), *([f"{recipes} of the {len(RECIPES)} recipes"] if recipes else [])]
    return f" (not scored here: {', '.join(absent)})" if absent else ""


def write_readme(results: Path, readme: Path = README, kept: Path = KEPT) -> None:
    """Write the table between the markers, and keep what it is made of.

    Raises:
        DataError: see `comparable`, `best` and `between`.
    """
    rows = {name: record for name, record in comparable(results, (), SCRIPT).items() if _is_compared(record)}
    compared = {record["name"] for row in best(rows) for record in (row.ours, row.theirs)}
    rows = {name: kept_record(record) if name in compared else without_blocks(record) for name, record in rows.items()}
    insert(readme, table(rows), BEGIN, END)
    kept.write_text("".join(json.dumps(record) + "\n" for record in rows.values()), encoding="utf-8")


def kept_record(record: Record) -> dict[str, Any]:
    """A record with no more blocks than its comparison needs, of five digits."""
    blocks = {"tokens": record["blocks"]["tokens"], "kld": [float(f"{kld:.5g}") for kld in record["blocks"]["kld"]]}
    return {**without_blocks(record), "blocks": blocks}


def main() -> None:
    """Score a share, or write the table."""
    asked = scoring_options(__doc__.split("\n")[0], RESULTS).parse_args()
    try:
        if asked.readme:
            write_readme(RESULTS.parent if asked.out == RESULTS else asked.out)
        else:
            evaluate(lambda model: of_share(contestants(model), asked.share), asked)
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
