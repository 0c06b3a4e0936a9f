"""Records grouped into runs (what may be compared) and rows (one scored configuration each)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kvloom.report._format import format_count, join_words
from kvloom.report._records import Record
from kvloom.report._values import Interval, number

T = TypeVar("T")

METHODS = {
    "dense": "dense cache",
    "exact": "exact plan",
    "kvmix": "KVmix rule",
    "uniform": "uniform",
    "uniform+sinks": "uniform, exact sinks",
    "quanto": "QuantizedCache, quanto",
    "hqq": "QuantizedCache, hqq",
    "greedy": "greedy plan",
    "kvq": "KVQ rule",
    "kvtuner": "KVTuner search",
    "kvtuner-warm": "KVTuner search, warm",
}
RUN_FIELDS = ("model", "device", "dtype", "context")


@dataclass(frozen=True)
class Row:
    """One scored configuration, joined with its decode speed."""

    name: str
    method: str
    target_bits: float | None
    true_bits: float | None
    live_bytes: float | None
    kld: Interval
    kld_p99: Interval
    ppl: Interval
    top1: Interval
    tokens_per_s: Interval
    prefill: str
    record: Record = field(repr=False)

    @property
    def label(self) -> str:
        """The name; with the method where the name does not say it."""
        said = self.method.lower() in self.name.lower()
        return self.name if said else f"{self.name} ({self.method})"

    @property
    def layers(self) -> list[Record]:
        """Bits per layer, `[]` for a cache without a plan."""
        layers = self.record.get("layers")
        return [entry for entry in layers or [] if isinstance(entry, dict)]


@dataclass(frozen=True)
class Run:
    """Rows scored on the same model, device, dtype, context and text: those that compare."""

    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Model, device, dtype and context in one line."""
        first = self.rows[0].record
        parts = [str(first[key]) for key in RUN_FIELDS[:3] if first.get(key)]
        if number(first.get("context")):
            parts.append(f"{format_count(number(first['context']))} tokens of context")
        return ", ".join(parts)

    @property
    def methods(self) -> list[str]:
        """The methods of the run, in the order of the legend."""
        return sorted(unique(row.method for row in self.rows), key=method_rank)

    def of(self, *methods: str) -> list[Row]:
        """The rows of these methods."""
        return [row for row in self.rows if row.method in methods]

    def facts(self, key: str) -> list[object]:
        """The distinct values that the run's records give a field, absent ones left out."""
        return unique(row.record[key] for row in self.rows if row.record.get(key) is not None)


def unique(values: Iterable[T]) -> list[T]:
    """Distinct values in the order they first appear."""
    return list(dict.fromkeys(values))


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of one kind."""
    return [record for record in records if record.get("kind") == kind]


def method_rank(method: str) -> int:
    """The place of a method in tables and legends; unknown ones come last."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def method_label(method: str) -> str:
    """The name of a method as the report writes it."""
    return METHODS.get(method, method)


def config_order(record: Record) -> tuple[int, float, str]:
    """Sort key for records of one cache each: method, then budget or else true bits, then name."""
    bits = number(record.get("target_bits"))
    bits = number(record.get("true_bits")) if bits is None else bits
    return method_rank(_text(record, "method")), 99.0 if bits is None else bits, record["name"]


def text_names(record: Record) -> list[str]:
    """The names of the texts that a record was scored on."""
    text = record.get("text")
    names = text.get("names") if isinstance(text, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def group_runs(records: Sequence[Record]) -> list[Run]:
    """Group fidelity records into runs; of two records of one configuration the later counts."""
    decode = of_kind(records, "decode")
    runs: dict[tuple[object, ...], dict[tuple[str, str], Row]] = {}
    for record in of_kind(records, "fidelity"):
        row = _row(record, decode)
        runs.setdefault(_run_key(record), {})[row.name, row.prefill] = row
    return [Run(tuple(sorted(rows.values(), key=_row_order))) for rows in runs.values()]


def describe_protocol(run: Run) -> str:
    """How many tokens were scored, of which text, and how prompts attended."""
    tokens = [int(value) for value in _numbers(run, "scored_tokens")]
    names = unique(name for row in run.rows for name in text_names(row.record))
    scored = f"{_span(tokens)} tokens" if tokens else "an unrecorded number of tokens"
    source = f" of {join_words(names)}" if names else ""
    chunks = [int(value) for value in _numbers(run, "chunk")]
    through = f", in chunks of {_span(chunks)} through the cache" if chunks else ""
    if prompts := [int(value) for value in _numbers(run, "prompt") if value]:
        through = f", decoded one by one after prompts of {_span(prompts)} tokens; bytes are those of the prompts"
    return f"Scored on {scored}{source}{through}. {_prefills(run)}".strip()


def _prefills(run: Run) -> str:
    compressed = [row for row in run.rows if row.method != "dense" and row.prefill]
    groups = {
        prefill: sorted(unique(r.method for r in compressed if r.prefill == prefill), key=method_rank)
        for prefill in unique(row.prefill for row in compressed)
    }
    if not groups:
        return ""
    told = [f"{prefill} ({', '.join(methods)})" for prefill, methods in groups.items()]
    return f"Prompt attention: {'; '.join(told)}."


def _numbers(run: Run, key: str) -> list[float]:
    return [value for value in map(number, run.facts(key)) if value is not None]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _run_key(record: Record) -> tuple[object, ...]:
    text = record.get("text")
    digest = text.get("sha256") if isinstance(text, dict) else None
    return (*(str(record.get(key)) for key in RUN_FIELDS), str(digest), number(record.get("prompt")) or 0)


def _row(record: Record, decode: Sequence[Record]) -> Row:
    return Row(
        name=record["name"],
        method=_text(record, "method"),
        target_bits=number(record.get("target_bits")),
        true_bits=number(record.get("true_bits")),
        live_bytes=number(record.get("live_bytes")),
        kld=Interval.of(record.get("kld")),
        kld_p99=Interval.of(record.get("kld_p99")),
        ppl=Interval.of(record.get("ppl")),
        top1=Interval.of(record.get("top1")),
        tokens_per_s=_speed(record, decode),
        prefill=_text(record, "prefill"),
        record=record,
    )


def _speed(record: Record, decode: Sequence[Record]) -> Interval:
    for other in reversed(decode):
        same_model = other.get("model", record.get("model")) == record.get("model")
        if other["name"] == record["name"] and same_model:
            return Interval.of(other.get("tokens_per_s"))
    return Interval()


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    return value if isinstance(value, str) else ""


def _row_order(row: Row) -> tuple[bool, float, int, float, str]:
    true_bits = 99.0 if row.true_bits is None else row.true_bits
    budget = true_bits if row.target_bits is None else row.target_bits
    return row.method != "dense", round(budget, 2), method_rank(row.method), true_bits, row.name
