"""Parts of the page for tasks, drift, memory, signals, kernels and generation."""

from __future__ import annotations

import pytest

from kvloom.report._drift import build_drifts
from kvloom.report._generate import build_generations
from kvloom.report._kernels import build_kernels
from kvloom.report._memory import build_memory
from kvloom.report._rankings import SPAN, build_rankings
from kvloom.report._table import Table
from kvloom.report._task_scores import build_tasks
from tests.report.synthetic import (
    Record,
    comparisons,
    drifts,
    generations,
    kernels,
    memories,
    task,
    tasks,
)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_tasks_are_set_against_the_uncompressed_cache() -> None:
    ruler, gsm8k = build_tasks(tasks())
    assert [ruler.title, gsm8k.title] == ["RULER", "GSM8K"]
    assert [cell.text for cell in ruler.table.headings] == ["Task", "dense", "short plan", "long plan"]
    assert texts(ruler.table) == [
        [name, "80.0 %", "30.0 %", "75.0 %"] for name in ("ruler/vt", "ruler/niah_single_1", "mean")
    ]
    _, dense, short, long = ruler.table.rows[0]
    assert (dense.css, short.css, long.css) == ("", "worse", "top")
    assert [cell.css for cell in ruler.table.rows[2]] == ["sum", "sum", "sum worse", "sum top"]
    assert dense.below == ""
    assert short.below.startswith("−50.0 [−")
    assert long.below.startswith("−5.0 [−")
    assert ", +" in long.below
    assert "2.60 true bits" in short.tip
    assert ruler.table.caption == "Prompt attention: exact (dense cache); quantized (exact plan)."
    assert gsm8k.table.rows[0][0].below == "20 cases, match"


def test_task_charts_have_a_point_for_each_plan_and_the_dense_level() -> None:
    ruler, _ = build_tasks(tasks())
    (plot,) = ruler.plots
    assert plot.title == "mean of 2 tasks, 4,096 tokens"
    assert [(point.x, point.y) for point in plot.series[0].points] == [(2.6, 30.0), (4.1, 75.0)]
    assert [rule.label for rule in plot.rules] == ["uncompressed 80.0 %"]


def test_lengths_have_means_and_charts_of_their_own() -> None:
    longer = [{**record, "length": 8192} for record in tasks() if record["task"].startswith("ruler")]
    (ruler,) = build_tasks([*(record for record in tasks() if record["task"].startswith("ruler")), *longer])
    assert [row[0].text for row in ruler.table.rows].count("mean") == 2
    assert [plot.title for plot in ruler.plots] == [f"mean of 2 tasks, {n} tokens" for n in ("4,096", "8,192")]


def test_a_cache_without_all_tasks_has_no_mean() -> None:
    records = [it for it in tasks() if (it["name"], it["task"]) != ("long plan", "ruler/vt")]
    (ruler, _) = build_tasks(records)
    assert texts(ruler.table)[-1] == ["mean", "80.0 %", "30.0 %", ""]
    assert ruler.plots == ()


def test_scores_that_are_no_shares_have_no_best() -> None:
    score = {"value": 12.5, "low": 11.0, "high": 14.0, "interval": "normal"}
    records = [{**it, "score": score, "task": "lm-eval/wikitext", "cases": []} for it in tasks()[:3]]
    records[1]["score"] = {**score, "value": 13.5}
    (group,) = build_tasks(records)
    assert texts(group.table) == [["lm-eval/wikitext", "12.5", "13.5", "12.5"]]
    assert group.table.rows[0][2].css == ""
    assert group.plots == ()


def test_prompts_that_attend_otherwise_are_caches_of_their_own() -> None:
    exact = {**task("short plan", "exact", 2.6, "gsm8k", [1, 0, 1]), "prefill": "exact"}
    (group,) = build_tasks([*tasks()[6:9], exact])
    headings = [(cell.text, cell.below) for cell in group.table.headings]
    assert ("short plan", "exact prompts") in headings
    assert ("short plan", "quantized prompts") in headings


def test_models_have_tables_of_their_own() -> None:
    other = [{**record, "model": "another"} for record in tasks()]
    groups = build_tasks([*tasks(), *other])
    assert len(groups) == 4
    assert groups[2].title == "RULER, another, cpu, float32"


def test_drift_is_told_by_the_slope() -> None:
    (drift,) = build_drifts(drifts())
    assert [row[-1] for row in texts(drift.table)] == ["gets worse", "no drift seen"]
    (plot,) = drift.plots
    assert [one.label for one in plot.series] == ["short plan", "long plan"]
    assert [point.x for point in plot.series[0].points] == [64, 192, 320, 442]


def test_a_drift_without_blocks_is_a_table_alone() -> None:
    (drift,) = build_drifts([{"kind": "drift", "name": "mine"}])
    assert drift.plots == ()
    assert texts(drift.table) == [["mine", "–", "–", "–", "–"]]


def test_memory_is_told_at_the_longest_context() -> None:
    (memory,) = build_memory(memories())
    assert texts(memory.table) == [
        ["dense", "22.5 GiB", "23,040", "1.00×", "1,005K", "2M", "–"],
        ["short plan", "3.66 GiB", "3,744", "6.15×", "1,005K", "2M", "–"],
        ["long plan", "5.77 GiB", "5,904", "3.90×", "1,005K", "2M", "–"],
    ]
    (plot,) = memory.plots
    assert [round(rule.y) for rule in plot.rules] == [(gb * 10**9 - 270_000_000) for gb in (24, 48, 80)]


def test_signals_are_ranked_by_plans_of_equal_bits() -> None:
    (ranking,) = build_rankings(comparisons())
    assert [row.name for row in ranking.rows] == ["best", "worst"]
    assert ranking.rows[0].seconds == "6.00 s"
    spread, equal = ranking.rows[1].bars
    assert spread
    assert equal
    assert (equal.text, equal.bounds) == ("0.100", "[-0.100, 0.200]")
    assert (equal.low, ranking.zero) == (0.0, round(SPAN * 0.1 / 1.1, 1))
    assert equal.low < ranking.zero < equal.at < equal.high < spread.at < SPAN
    (plot,) = ranking.plots
    assert [[point.x for point in one.points] for one in plot.series] == [[0.2, 0.4], [0.2, 0.4]]


def test_kernels_have_a_roofline_and_tables() -> None:
    (part,) = build_kernels(kernels())
    attend, encode, append = part.tables
    assert [cell.text for cell in attend.headings] == ["Attention, cuda", "K4V2", "K4V4"]
    assert texts(attend) == [["8 × 32K", "10.0 µs", "–"]]
    assert (attend.rows[0][1].below, attend.rows[0][1].css) == ("5.00×", "better")
    assert attend.rows[0][2].tip == "refused"
    assert texts(encode) == [["8 × 32K", "700 µs"]]
    assert texts(append) == [["8", "2.36 µs"]]
    assert part.notes == ("triton: is not here", "flashy: not installed")
    (plot,) = part.plots
    roof, dense, cuda = plot.series
    assert roof.label == "read 3,000 GB/s, 600 TFLOP/s"
    assert [point.y for point in roof.line][1:] == [pytest.approx(600), pytest.approx(600)]
    assert dense.points[0].x == 4.0
    assert (cuda.points[0].x, cuda.points[0].y) == (16.0, pytest.approx(40.0))


def test_faulty_attention_is_not_drawn() -> None:
    wrong = [{**it, "fault": "computes something else"} if "fault" in it else it for it in kernels()]
    (part,) = build_kernels(wrong)
    assert part.plots == ()


def test_generation_has_a_table_for_each_load() -> None:
    other: Record = {**generations()[2], "load": "B*x32K", "prompt": 32768, "batch": 7}
    first, second = build_generations([*generations(), other])
    assert first.title.endswith("batch 1, 8K + 64 tokens")
    assert second.title.endswith("the largest batch that fits, 32K + 64 tokens")
    plan, static = first.table.rows
    assert [cell.text for cell in plan] == [
        *("plan fixed + compile", "1", "1.50 s", "20.0", "50.0 ms", "2.50×", "1.25×", "1.00 MiB", "4.50", "–")
    ]
    assert (static[0].text, static[0].below) == ("static", "out of memory")
    assert first.notes == ("hqq is not installed", "Reads 21 GB/s.")
