from __future__ import annotations

import math
import re

from kvloom.report import render_text
from kvloom.report._columns import COLUMNS
from tests.report.synthetic import Record, full_records


def rows(records: list[Record]) -> list[list[str]]:
    lines = render_text(records).splitlines()
    start = next(index for index, line in enumerate(lines) if set(line) == {"-", " "})
    body = lines[start + 1 : lines.index("", start)]
    return [re.split(r" {2,}", line.strip()) for line in body]


def test_the_table_says_what_was_measured() -> None:
    text = render_text(full_records())
    assert text.startswith("SmolLM2-135M-Instruct, cpu, float32, 2,048 tokens of context\n")
    assert "Scored on 16,384 tokens of worked.txt, greatwork.txt and hwh.txt, in chunks of 128" in text
    assert "quantized (exact, kvmix, uniform); chunk-exact (quanto, hqq)" in text


def test_a_row_holds_every_figure() -> None:
    found = {row[1]: row for row in rows(full_records())}
    figures = ["3.49", "9.82 MiB", "0.0204 [0.0190, 0.0218]", "0.224", "14.46 [13.88, 15.04]", "87.2 %", "33.4"]
    assert found["exact 3.5"] == ["3.5", "exact 3.5", *figures]


def test_rows_go_by_budget_after_the_dense_cache() -> None:
    names = [row[1] for row in rows(full_records())]
    assert names[:5] == ["dense", "exact 2.5", "kvmix 2.5", "uniform 2.5", "quanto 2-bit, keys per channel"]
    assert names[-2:] == ["exact 6", "uniform 6"]


def test_columns_are_aligned() -> None:
    lines = [line for line in render_text(full_records()).splitlines() if "MiB" in line]
    assert len({line.index("MiB") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1


def test_absent_figures_are_dashes() -> None:
    record: Record = {"kind": "fidelity", "name": "exact 3", "method": "exact", "kld": math.nan, "ppl": {"low": 3}}
    assert rows([record]) == [["–", "exact 3", *["–"] * (len(COLUMNS) - 2)]]


def test_a_name_that_hides_its_method_is_given_it() -> None:
    record: Record = {"kind": "fidelity", "name": "mine", "method": "exact", "true_bits": 3.0}
    assert rows([record])[0][1] == "mine (exact)"


def test_of_two_records_of_one_configuration_the_later_counts() -> None:
    old: Record = {"kind": "fidelity", "name": "exact", "method": "exact", "prefill": "quantized", "true_bits": 3.0}
    new = {**old, "true_bits": 4.0}
    other = {**old, "prefill": "exact", "true_bits": 5.0}
    assert [row[2] for row in rows([old, new, other])] == ["4.00", "5.00"]


def test_decode_speed_is_joined_by_name_and_model() -> None:
    scored: Record = {"kind": "fidelity", "name": "exact", "method": "exact", "model": "one"}
    mine: Record = {"kind": "decode", "name": "exact", "model": "one", "tokens_per_s": {"value": 12.0}}
    other = {**mine, "model": "two", "tokens_per_s": {"value": 99.0}}
    assert rows([scored, mine, other])[0][-1] == "12.0"
    assert rows([scored, other])[0][-1] == "–"


def test_runs_on_different_models_have_tables_of_their_own() -> None:
    one: Record = {"kind": "fidelity", "name": "exact", "method": "exact", "model": "one"}
    text = render_text([one, {**one, "model": "two"}])
    assert [block.splitlines()[0] for block in text.split("\n\n") if block in ("one", "two")] == ["one", "two"]


def test_nothing_scored() -> None:
    records = [{"kind": "generate"}, {"kind": "generate"}, {"kind": "kernel_attend"}]
    said = "No fidelity or task records for a table; there are others: generate (2), kernel_attend (1)."
    assert render_text(records) == said
    assert render_text([]) == "No fidelity or task records for a table; there are no others."


def test_task_scores_have_a_line_each() -> None:
    score = {"value": 0.5, "low": 0.25, "high": 0.75}
    task: Record = {
        "kind": "task",
        "name": "K2V2",
        "task": "ruler/vt",
        "length": 4096,
        "true_bits": 2.53,
        "score": score,
        "metric": "match",
        "total": 20,
        "prefill": "quantized",
    }
    heading, rule, *lines = render_text([task, {**task, "kind": "needle", "task": "needle"}]).splitlines()
    assert re.split(r" {2,}", lines[0]) == [
        "ruler/vt", "4,096", "K2V2", "2.53", "50.0 % [25.0 %, 75.0 %]", "match", "20", "quantized"
    ]  # fmt: skip
    assert rule.startswith("-" * len("ruler/vt") + "  ")
    assert heading.startswith("Task      Tokens")
    assert lines[1].startswith("needle")


def test_needles_of_different_lengths_are_told_apart() -> None:
    def needle(*lengths: object) -> Record:
        cases = [{"tokens": tokens, "depth": 0.5, "found": True} for tokens in lengths]
        return {"kind": "needle", "name": "dense", "cases": cases, "score": 1.0}

    lines = render_text([needle(4096, 1024, 2048), needle(8000), needle(None)]).splitlines()[2:]
    assert [re.split(r" {2,}", line)[1] for line in lines] == ["1,024 to 4,096", "8,000", "–"]
