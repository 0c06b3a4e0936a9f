"""Needle results: one small grid of context length by depth for each cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._format import DASH, format_count, format_share
from kvloom.report._records import Record
from kvloom.report._runs import config_order, of_kind
from kvloom.report._values import number


@dataclass(frozen=True)
class NeedleCell:
    """One length and depth: the share of needles found, as text and as a shade."""

    text: str
    css: str
    title: str


@dataclass(frozen=True)
class NeedleRow:
    """One depth."""

    depth: str
    cells: tuple[NeedleCell, ...]


@dataclass(frozen=True)
class NeedleGrid:
    """One cache."""

    label: str
    found: str
    tokens: tuple[str, ...]
    rows: tuple[NeedleRow, ...]


def build_needles(records: Sequence[Record]) -> list[NeedleGrid]:
    """A grid for each needle record, the dense cache first; of two of one name the later counts."""
    latest = {record["name"]: record for record in of_kind(records, "needle")}
    return [_grid(record) for record in sorted(latest.values(), key=config_order)]


def needle_lengths(record: Record) -> list[float]:
    """The lengths of a record's prompts, in order."""
    return sorted({tokens for case in _cases(record) if (tokens := number(case.get("tokens"))) is not None})


def _grid(record: Record) -> NeedleGrid:
    cases: dict[tuple[float, float], list[bool]] = {}
    for case in _cases(record):
        tokens, depth = number(case.get("tokens")), number(case.get("depth"))
        if tokens is not None and depth is not None:
            cases.setdefault((depth, tokens), []).append(bool(case.get("found")))
    lengths = sorted({tokens for _, tokens in cases})
    depths = sorted({depth for depth, _ in cases})
    return NeedleGrid(
        label=record["name"],
        found=_found(record, cases),
        tokens=tuple(map(format_count, lengths)),
        rows=tuple(NeedleRow(_depth(d), tuple(_cell(cases.get((d, t), []), d, t) for t in lengths)) for d in depths),
    )


def _cases(record: Record) -> list[Record]:
    return [case for case in record.get("cases") or [] if isinstance(case, dict)]


def _found(record: Record, cases: dict[tuple[float, float], list[bool]]) -> str:
    found, total = number(record.get("found")), number(record.get("total"))
    if found is None or total is None:
        answers = [answer for group in cases.values() for answer in group]
        found, total = float(sum(answers)), float(len(answers))
    return f"{format_count(found)} of {format_count(total)} found"


def _cell(answers: list[bool], depth: float, tokens: float) -> NeedleCell:
    where = f"{format_count(tokens)} tokens, depth {_depth(depth)}"
    if not answers:
        return NeedleCell(DASH, "none", f"{where}: not run")
    found, total = sum(answers), len(answers)
    css = "hit" if found == total else "miss" if found == 0 else "part"
    told = f"{found} of {total} found" if total > 1 else "found" if found else "missed"
    text = f"{found}/{total}" if total > 1 else "found" if found else "missed"
    return NeedleCell(text, css, f"{where}: {told}")


def _depth(depth: float) -> str:
    return format_share(depth).replace(".0 %", " %")
