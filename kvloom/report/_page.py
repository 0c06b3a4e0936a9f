"""The report: one self-contained HTML page that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvloom.report._bits import build_bits
from kvloom.report._columns import COLUMNS
from kvloom.report._compare import BITS_ABOVE, BITS_BELOW
from kvloom.report._drift import build_drifts
from kvloom.report._explore import build_explorers
from kvloom.report._format import (
    format_bits,
    format_bounds,
    format_small,
    format_times,
)
from kvloom.report._generate import build_generations
from kvloom.report._headline import build_headline
from kvloom.report._kernels import build_kernels
from kvloom.report._memory import build_memory
from kvloom.report._needle import build_needles
from kvloom.report._pareto import build_pareto
from kvloom.report._rankings import build_rankings
from kvloom.report._records import KINDS, Record
from kvloom.report._results import build_results
from kvloom.report._runs import Run, group_runs, unique
from kvloom.report._samples import build_samples
from kvloom.report._signal import build_signals
from kvloom.report._style import COLOURS, MARKERS
from kvloom.report._task_scores import build_tasks


@dataclass(frozen=True)
class Report:
    """The records of a page, and its comparable runs."""

    records: Sequence[Record]
    runs: list[Run]


@dataclass(frozen=True)
class Section:
    """A part of the page; one whose `build` finds nothing is left out."""

    anchor: str
    title: str
    build: Callable[[Report], Sequence[object]]


SECTIONS = (
    Section("pareto", "Quality against memory", lambda report: build_pareto(report.runs)),
    Section("results", "Results", lambda report: build_results(report.runs, report.records)),
    Section("tasks", "Tasks", lambda report: build_tasks(report.records)),
    Section("drift", "Drift while decoding", lambda report: build_drifts(report.records)),
    Section("explore", "The best plan of every budget", lambda report: build_explorers(report.records)),
    Section("memory", "Memory over context", lambda report: build_memory(report.records)),
    Section("bits", "Bits per layer", lambda report: build_bits(report.runs)),
    Section("signal", "Importance signal", lambda report: build_signals(report.records)),
    Section("ranking", "Signals compared", lambda report: build_rankings(report.records)),
    Section("kernels", "Kernels", lambda report: build_kernels(report.records)),
    Section("generate", "Generation", lambda report: build_generations(report.records)),
    Section("needle", "Needle in a haystack", lambda report: build_needles(report.records)),
    Section("samples", "Generated text", lambda report: build_samples(report.records)),
)


def render_html(records: Sequence[Record], title: str, notes: Sequence[str] = ()) -> str:
    """Render records as one HTML page without external resources.

    Args:
        records: Result records as `load_records` returns them; a kind that is absent leaves its
            section out.
        title: The title of the page.
        notes: Paragraphs of plain text for the end of the page.

    Returns:
        The page; write it as UTF-8.
    """
    report = Report(records, group_runs(records))
    built = [(section, section.build(report)) for section in SECTIONS]
    env = _environment()
    style = env.get_template("page.css").render(colours=COLOURS)
    script = env.get_template("page.js").render()
    return env.get_template("page.html").render(
        title=title,
        page="explore" if records and all(record["kind"] == "front" for record in records) else "report",
        unread=_unread(records),
        notes=list(notes),
        headlines=[(run.title, build_headline(run)) for run in report.runs],
        sections=[(section, content) for section, content in built if content],
        columns=COLUMNS,
        markers=MARKERS,
        when=_when(records),
        record_count=len(records),
        bits_above=BITS_ABOVE,
        bits_below=BITS_BELOW,
        style=style,
        script=script,
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("kvloom.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        bits=format_bits,
        small=format_small,
        times=format_times,
        times_bounds=lambda ratio: format_bounds(ratio, format_times),
    )
    return env


def _unread(records: Sequence[Record]) -> str:
    """Kinds that this version does not show, each with its number of records."""
    counts = Counter(record["kind"] for record in records if record["kind"] not in KINDS)
    return ", ".join(f"{count:,} of kind {kind}" for kind, count in counts.items())


def _digest(text: str) -> str:
    """A content security policy source that allows exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _when(records: Sequence[Record]) -> str:
    days = sorted(unique(str(record["when"])[:10] for record in records if record.get("when")))
    return " to ".join(unique([days[0], days[-1]])) if days else ""
