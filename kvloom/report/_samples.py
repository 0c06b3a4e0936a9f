"""Generated text side by side, with the point marked where it leaves the dense cache's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.report._format import format_budget, format_count
from kvloom.report._records import Record
from kvloom.report._runs import config_order, method_label, of_kind, unique
from kvloom.report._style import method_style
from kvloom.report._values import number


@dataclass(frozen=True)
class Sample:
    """One cache's text: the part shared with the dense cache's text, and the rest."""

    label: str
    css: str
    facts: str
    shared: str
    rest: str
    agreement: str


@dataclass(frozen=True)
class Prompt:
    """A prompt and what each cache made of it."""

    text: str
    samples: tuple[Sample, ...]


def build_samples(records: Sequence[Record]) -> list[Prompt]:
    """The prompts in order of appearance; the dense cache's text first."""
    samples = of_kind(records, "sample")
    return [_prompt(prompt, samples) for prompt in unique(map(_prompt_text, samples))]


def _prompt_text(record: Record) -> str:
    return str(record.get("prompt") or "")


def _prompt(prompt: str, records: list[Record]) -> Prompt:
    latest = {record["name"]: record for record in records if _prompt_text(record) == prompt}
    ordered = sorted(latest.values(), key=config_order)
    dense = next((_text(entry) for entry in ordered if entry.get("method") == "dense"), None)
    return Prompt(prompt, tuple(_sample(entry, dense) for entry in ordered))


def _text(record: Record) -> str:
    return str(record.get("text") or "").strip()


def _sample(record: Record, dense: str | None) -> Sample:
    text = _text(record)
    method = str(record.get("method") or "")
    compared = dense is not None and method != "dense"
    shared = _shared(text, dense) if compared and dense is not None else text
    return Sample(
        label=record["name"],
        css=method_style(method).css,
        facts=_facts(record, method),
        shared=shared,
        rest=text[len(shared) :],
        agreement=_agreement(shared, text) if compared else "",
    )


def _shared(text: str, dense: str) -> str:
    """The common beginning of two texts, cut back to whole words."""
    if text == dense:
        return text
    length = next(
        (at for at, (a, b) in enumerate(zip(text, dense, strict=False)) if a != b), min(len(text), len(dense))
    )
    if all(len(one) == length or one[length].isspace() for one in (text, dense)):
        return text[:length]
    return text[: max(text.rfind(" ", 0, length), text.rfind("\n", 0, length)) + 1]


def _agreement(shared: str, text: str) -> str:
    if shared == text:
        return "Same text as the dense cache"
    words = len(shared.split())
    if words == 0:
        return "Differs from the dense cache at once"
    return f"Same as the dense cache for {words} {'word' if words == 1 else 'words'}"


def _facts(record: Record, method: str) -> str:
    bits, tokens = number(record.get("target_bits")), number(record.get("tokens"))
    facts = [
        method_label(method) if method else "",
        f"budget {format_budget(bits)} bits" if bits is not None else "",
        f"{format_count(tokens)} tokens" if tokens is not None else "",
    ]
    return ", ".join(fact for fact in facts if fact)
