"""Task scores: for each group of tasks a table of task by cache, and a chart of the scores over true bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from kvloom.report._chart import Axis, Datum, Plot, Rule, Series
from kvloom.report._difference import Scores, difference, mean
from kvloom.report._format import (
    format_bits,
    format_bounds,
    format_bytes,
    format_count,
    format_interval,
    format_share,
    format_small,
    join_words,
)
from kvloom.report._records import Record
from kvloom.report._runs import config_order, method_label, method_rank, of_kind, unique
from kvloom.report._style import method_style
from kvloom.report._table import Entry, Table
from kvloom.report._values import Interval, number

GROUPS = {"ruler": "RULER", "longbench": "LongBench", "gsm8k": "GSM8K", "lm-eval": "lm-eval"}
SHARES = ("wilson", "bootstrap")  # intervals of means of scores from 0 to 1
X_AXIS = Axis("True bits per cached value")
Y_AXIS = Axis("Score, %")


@dataclass(frozen=True)
class TaskGroup:
    """The tasks of one group on one model: a chart for each length, where a plan has a score there, and the table."""

    title: str
    plots: tuple[Plot, ...]
    table: Table


Cache = tuple[str, str]
"""Name of a cache, and how prompts attended in it."""


@dataclass(frozen=True)
class _Line:
    """The record of every cache on one task at one length."""

    task: str
    length: float | None
    records: dict[Cache, Record]

    @property
    def label(self) -> str:
        return f"{self.task}, {format_count(self.length)} tokens" if self.length else self.task

    @property
    def dense(self) -> Record | None:
        return next((it for it in self.records.values() if it.get("method") == "dense"), None)

    def against_dense(self, record: Record) -> Interval:
        """What a record's score is above that of the uncompressed cache on the same cases."""
        if self.dense is None or self.dense is record:
            return Interval()
        return difference(_score(record), _score(self.dense), _cases(record), _cases(self.dense))


def build_tasks(records: Sequence[Record]) -> list[TaskGroup]:
    """The groups in the order in which they were run; of two records of one case the later counts."""
    scored = [it for it in of_kind(records, "task") if Interval.of(it.get("score")).value is not None]
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in scored:
        found.setdefault((_where(record), _group(record)), []).append(record)
    several = len({where for where, _ in found}) > 1
    return [
        _task_group(own, f"{GROUPS.get(group, group)}, {where}" if several else GROUPS.get(group, group))
        for (where, group), own in found.items()
    ]


def _where(record: Record) -> str:
    return ", ".join(str(record[key]) for key in ("model", "device", "dtype") if record.get(key))


def _group(record: Record) -> str:
    return str(record.get("task", "")).partition("/")[0].removesuffix("_multiturn")


def _task_group(records: Sequence[Record], title: str) -> TaskGroup:
    lines = _lines(records)
    caches = _caches(records)
    return TaskGroup(title, tuple(_plots(lines, caches, title)), _table(lines, caches, title))


def _lines(records: Iterable[Record]) -> list[_Line]:
    found: dict[tuple[str, float | None], dict[Cache, Record]] = {}
    for record in records:
        own = found.setdefault((str(record.get("task", "")), number(record.get("length"))), {})
        own[_cache(record)] = record
    lines = [_Line(task, length, own) for (task, length), own in found.items()]
    return sorted(lines, key=lambda line: line.length or 0.0)


def _cache(record: Record) -> Cache:
    return record["name"], str(record.get("prefill", ""))


def _caches(records: Iterable[Record]) -> dict[Cache, Record]:
    """A record of each cache, in the order of columns: uncompressed first."""
    found = {_cache(record): record for record in records}
    return dict(sorted(found.items(), key=lambda item: config_order(item[1])))


def _table(lines: Sequence[_Line], caches: dict[Cache, Record], title: str) -> Table:
    rows = [_row(line, caches) for line in lines]
    rows += [_mean_row(own, length, caches) for length, own in _by_length(lines) if len(own) > 1]
    twice = len({name for name, _ in caches}) < len(caches)
    columns = [Entry(name, below=f"{prefill} prompts" if twice else "") for name, prefill in caches]
    return Table(f"Scores on {title}", (Entry("Task"), *columns), tuple(rows), caption=_prompts(caches))


def _by_length(lines: Sequence[_Line]) -> list[tuple[float | None, list[_Line]]]:
    """Lines by length; a group of one metric only has a mean worth telling."""
    return [(length, list(own)) for length, own in groupby(lines, key=lambda line: line.length)]


def _row(line: _Line, caches: dict[Cache, Record]) -> tuple[Entry, ...]:
    held = [line.records.get(cache) for cache in caches]
    best = _best(held)
    cells = [Entry("") if it is None else _cell(line, it, best=it["name"] in best) for it in held]
    return Entry(line.task, below=_facts(line)), *cells


def _best(records: Iterable[Record | None]) -> set[str]:
    """Names of the compressed caches of the highest score; of none where all are equal, or high is not good."""
    known = [it for it in records if it is not None and it.get("method") != "dense"]
    values = [_score(it).value or 0.0 for it in known]
    if len(set(values)) < 2 or not all(map(_is_share, known)):
        return set()
    return {it["name"] for it, value in zip(known, values, strict=True) if value == max(values)}


def _facts(line: _Line) -> str:
    first = next(iter(line.records.values()))
    totals = unique(format_count(number(it.get("total"))) for it in line.records.values())
    tokens = f"{format_count(line.length)} tokens" if line.length else ""
    return ", ".join(
        filter(
            None,
            [tokens, f"{join_words(totals)} {'case' if totals == ['1'] else 'cases'}", str(first.get("metric") or "")],
        )
    )


def _cell(line: _Line, record: Record, *, best: bool) -> Entry:
    score, gap = _score(record), line.against_dense(record)
    share = _is_share(record)
    write = format_share if share else format_small
    told = [
        f"{record['name']}, {line.label}",
        f"score {format_interval(score, write)}",
        f"against uncompressed {_signed(gap, share)}" if gap.value is not None else "",
        f"{format_bits(number(record.get('true_bits')))} true bits, {format_bytes(number(record.get('live_bytes')))}",
        f"{record['prefill']} prompts" if record.get("prefill") else "",
    ]
    return Entry(
        write(score.value),
        _bounds(score) if share else format_bounds(score, write),
        "" if gap.value is None else _signed(gap, share),
        " ".join(filter(None, ["top" if best else "", _verdict(gap)])),
        "\n".join(filter(None, told)),
    )


def _bounds(score: Interval) -> str:
    """Ends of a share's interval in percent."""
    return format_bounds(score, lambda value: format_share(value).removesuffix(" %"))


def _verdict(gap: Interval) -> str:
    low, high = gap.bounds or (0.0, 0.0)
    return "worse" if high < 0 else "better" if low > 0 else ""


def _mean_row(lines: Sequence[_Line], length: float | None, caches: dict[Cache, Record]) -> tuple[Entry, ...]:
    label = Entry("mean", below=f"{format_count(length)} tokens" if length else f"of {len(lines)} tasks", css="sum")
    means = {cache: mean([_score(it) for it in _held(lines, cache)]) for cache in caches}
    packed = [means[cache].value or 0.0 for cache, it in caches.items() if it.get("method") != "dense"]
    top = max(packed) if len(set(packed)) > 1 else None
    return label, *(
        _mean_cell(lines, cache, means[cache], best=means[cache].value == top and it.get("method") != "dense")
        for cache, it in caches.items()
    )


def _held(lines: Sequence[_Line], cache: Cache) -> list[Record]:
    """A cache's records of all lines; none if one is missing, or has another unit."""
    held = [it for line in lines if (it := line.records.get(cache)) is not None and _is_share(it)]
    return held if len(held) == len(lines) else []


def _mean_cell(lines: Sequence[_Line], cache: Cache, score: Interval, *, best: bool) -> Entry:
    if score.value is None:
        return Entry("", css="sum")
    gap = mean([line.against_dense(it) for line, it in zip(lines, _held(lines, cache), strict=True)])
    below = "" if gap.value is None else _signed(gap, share=True)
    css = " ".join(filter(None, ["sum", "top" if best else "", _verdict(gap)]))
    return Entry(format_share(score.value), _bounds(score), below, css)


def _signed(gap: Interval, share: bool) -> str:
    """A difference with its sign and interval, shares in points of a percent."""
    scale = 100 if share else 1

    def write(value: float | None) -> str:
        return f"{scale * (value or 0.0):+.1f}".replace("-", "−")

    return format_interval(gap, write)


def _prompts(caches: dict[Cache, Record]) -> str:
    """How prompts attended, by method."""
    found: dict[str, list[str]] = {}
    for record in caches.values():
        if record.get("prefill"):
            found.setdefault(record["prefill"], []).append(method_label(str(record.get("method") or "")))
    told = [f"{prefill} ({join_words(unique(methods))})" for prefill, methods in found.items()]
    return f"Prompt attention: {'; '.join(told)}." if told else ""


def _plots(lines: Sequence[_Line], caches: dict[Cache, Record], title: str) -> list[Plot]:
    """Mean score over true bits; a chart for each length at which two compressed caches or more have all scores."""
    made = []
    for length, own in _by_length(lines):
        series = _all_series(own, caches)
        if sum(len(one.points) for one in series) > 1:
            at = f"{format_count(length)} tokens" if length else ""
            what = own[0].task if len(own) == 1 else f"mean of {len(own)} tasks"
            made.append(
                Plot(
                    "tasks",
                    ", ".join(filter(None, [what, at])),
                    f"Score on {title} against true bits, {', '.join(filter(None, [what, at]))}",
                    series,
                    X_AXIS,
                    Y_AXIS,
                    _dense_rule(own),
                )
            )
    return made


def _all_series(lines: Sequence[_Line], caches: dict[Cache, Record]) -> tuple[Series, ...]:
    points: dict[str, list[Datum]] = {}
    for cache, record in caches.items():
        method = str(record.get("method") or "")
        point = None if method == "dense" else _datum(lines, cache)
        if point is not None:
            points.setdefault(method, []).append(point)
    return tuple(
        Series(method_label(method), method_style(method), tuple(sorted(own, key=lambda it: it.x)), ())
        for method, own in sorted(points.items(), key=lambda item: method_rank(item[0]))
    )


def _datum(lines: Sequence[_Line], cache: Cache) -> Datum | None:
    records = _held(lines, cache)
    bits = [value for it in records if (value := number(it.get("true_bits"))) is not None]
    if len(bits) < len(lines):
        return None
    score, held = mean([_score(it) for it in records]), sum(bits) / len(bits)
    tip = f"{cache[0]}\n{format_bits(held)} true bits\nscore {format_interval(score, format_share)}"
    low, high = (None, None) if score.bounds is None else score.bounds
    return Datum(held, 100 * (score.value or 0.0), tip, _percent(low), _percent(high))


def _dense_rule(lines: Sequence[_Line]) -> tuple[Rule, ...]:
    dense = [line.dense for line in lines]
    score = mean([_score(it) for it in dense if it is not None])
    if None in dense or score.value is None:
        return ()
    return (Rule(100 * score.value, f"uncompressed {format_share(score.value)}"),)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _score(record: Record) -> Interval:
    return Interval.of(record.get("score"))


def _is_share(record: Record) -> bool:
    score = record.get("score")
    return isinstance(score, dict) and score.get("interval", SHARES[0]) in SHARES


def _cases(record: Record) -> Scores:
    """Scores of the record's cases in its own metric; `{}` where the record lacks any."""
    cases, metric = record.get("cases"), record.get("metric")
    if not isinstance(cases, list):
        return {}
    found: Scores = {}
    for place, case in enumerate(cases):
        scores = case.get("scores") if isinstance(case, dict) else None
        value = number(scores.get(metric)) if isinstance(scores, dict) else None
        if value is None:
            return {}
        found[str(case.get("name", place))] = value
    return found
