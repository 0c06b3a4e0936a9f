"""The table of signals in docs/signals.md: what `kvloom signals compare` measured.

    kvloom signals compare smollm2-135m --measured --device cuda --dtype float32 --batch 8 \
        -o benchmarks/results/signals.jsonl
    python -m benchmarks.signals

The first is resumable and can be split (`--share 2/8`). The second scores nothing: it writes the table between the two
markers of docs/signals.md, and the records it is made of to `benchmarks/signals.jsonl` (a test holds the page to them;
after a change of words, `--results benchmarks/signals.jsonl` makes the table again).
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from textwrap import fill

from benchmarks.methods import FOLDER, insert
from kvloom.errors import DataError
from kvloom.report import HEADINGS, Record, load_records, ranking_notes, ranking_rows

RESULTS = FOLDER / "results" / "signals.jsonl"
PAGE = FOLDER.parent / "docs" / "signals.md"
KEPT = FOLDER / "signals.jsonl"
BEGIN, END = "<!-- signals: written by benchmarks/signals.py -->", "<!-- /signals -->"
UNMEASURED = "Not measured yet: `kvloom signals compare` and `python -m benchmarks.signals` put the table here."
TRUTH = "measured_kl"


def table(records: list[Record]) -> str:
    """The markdown table, and what must be known to read it.

    Raises:
        DataError: there is no head-to-head among the records.
    """
    rows = ranking_rows(records)
    if not rows:
        raise DataError("there are no signal_comparison records: run kvloom signals compare first.")
    lines = [HEADINGS, ["---"] * len(HEADINGS), *((f"`{name}`", *cells) for name, *cells in rows)]
    notes = " ".join([ranking_notes(records), *_cost(records)])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", fill(notes, 120, break_on_hyphens=False)])


def _cost(records: list[Record]) -> list[str]:
    """What the truth costs beside the best signal."""
    seconds = {record["name"]: record["seconds"] for record in records if record["kind"] == "signal_comparison"}
    if TRUTH not in seconds:
        return []
    best = next(name for name, *_ in ranking_rows(records) if not name.startswith("measured"))
    return [f"`{best}` takes 1/{seconds[TRUTH] / seconds[best]:.0f} of the time of measuring one unit at a time."]


def write_page(results: Path, page: Path = PAGE, kept: Path = KEPT) -> None:
    """Write the table between the markers, and keep what it is made of.

    Raises:
        DataError: see `table`; or the markers are not there.
    """
    records = [record for record in load_records(results) if record["kind"] in ("signal_comparison", "random_plan")]
    insert(page, table(records), BEGIN, END)
    kept.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Write the table."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    try:
        write_page(parser.parse_args().results)
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
