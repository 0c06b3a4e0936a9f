from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from kvloom.report import render_html
from kvloom.report._chart import NARROW, Axis, Datum, Plot, Rule, Series, draw
from kvloom.report._page import SECTIONS
from kvloom.report._style import Style
from tests.report.synthetic import Record, every_record, full_records

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "</p><script>alert('x')</script><img src=x onerror=\"alert(1)\">"


class Page(HTMLParser):
    """Elements, text and nesting of a page; fails on an end tag that closes nothing it should."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of <{tag}> is there twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.elements if "id" in attrs]

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.elements if name == tag]
        return [attrs for attrs in found if not css or css in (attrs.get("class") or "").split()]


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(json.loads(json.dumps(every_record())), "A run", ["A note."])


def test_every_section_appears(html: str) -> None:
    page = Page(html)
    assert {section.anchor for section in SECTIONS} <= set(page.ids())
    assert "A run" in page.text
    assert "A note." in page.text
    assert "Measured 2026-11-22." in " ".join(page.text)


def test_ids_are_unique_and_links_lead_to_them(html: str) -> None:
    page = Page(html)
    assert len(page.ids()) == len(set(page.ids()))
    targets = [attrs["href"] for attrs in page.all("a")]
    assert len(targets) > len(SECTIONS)
    assert all(target and target.removeprefix("#") in page.ids() for target in targets)
    for _, attrs in page.elements:
        assert set((attrs.get("aria-labelledby") or "").split()) <= set(page.ids())


@pytest.mark.parametrize(
    ("kind", "anchors"),
    [
        ("fidelity", {"pareto", "results", "bits"}),
        ("signal", {"signal"}),
        ("needle", {"needle"}),
        ("sample", {"samples"}),
        ("decode", set()),
        ("task", {"tasks"}),
        ("drift", {"drift"}),
        ("memory", {"memory"}),
        ("front", {"explore"}),
        ("signal_comparison", {"ranking"}),
        ("random_plan", set()),
        ("kernel_ceilings", set()),
        ("generate", {"generate"}),
    ],
)
def test_a_missing_kind_leaves_its_sections_out(kind: str, anchors: set[str]) -> None:
    page = Page(render_html([record for record in every_record() if record["kind"] != kind], "A run"))
    assert {section.anchor for section in SECTIONS} - set(page.ids()) == anchors


def test_no_records_claim_nothing() -> None:
    page = Page(render_html([], "Nothing"))
    assert "nothing is claimed here" in " ".join(page.text)


def test_records_of_unknown_kinds_are_named() -> None:
    records = [*full_records(), *({"kind": "of a later version"} for _ in range(3)), {"kind": "other"}]
    text = " ".join(Page(render_html(records, "A run")).text)
    assert "Not shown: 3 of kind of a later version, 1 of kind other." in text
    assert "Not shown" not in " ".join(Page(render_html(every_record(), "A run")).text)


def poisoned(entry: Any) -> Any:
    """The records with every text replaced, but for the words that the report reads as names."""
    if isinstance(entry, dict):
        return {key: value if key in ("kind", "method") else poisoned(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [poisoned(value) for value in entry]
    return entry + EVIL if isinstance(entry, str) else entry


def test_all_text_of_records_is_escaped() -> None:
    records = [poisoned(record) for record in every_record()]
    records.append({**full_records()[1], "method": EVIL, "layers": [{"layer": 0, "key_bits": EVIL}]})
    html = render_html(records, EVIL, [EVIL])
    page = Page(html)
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert sum(EVIL in text for text in page.text) > 20
    assert EVIL not in html


def test_nothing_is_loaded_and_only_its_own_script_may_run(html: str) -> None:
    page = Page(html)
    for tag, attrs in page.elements:
        for name in ("src", "srcset", "data", "action", "poster", "xlink:href"):
            assert name not in attrs, (tag, name)
        assert (attrs.get("href") or "#").startswith(("#", "data:")), tag
        assert "style" not in attrs, "the policy refuses inline styles"
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs) or ""
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_is_small(html: str) -> None:
    assert len(html.encode()) < 1_000_000


def test_the_plot_has_every_configuration_at_both_sizes(html: str) -> None:
    page = Page(html)
    labels = [attrs["aria-label"] or "" for attrs in page.all("g", "point")]
    for record in full_records():
        if record["kind"] == "fidelity" and record["method"] != "dense":
            assert sum(label.startswith(f"{record['name']}, ") for label in labels) == 2
    (exact,) = {label for label in labels if label.startswith("exact 3.5")}
    assert "true bits 3.49, KLD 0.0204 [0.0190, 0.0218]" in exact
    assert "Not drawn, for want of a positive KLD or of true bits: dense." in html


def test_heat_map_cells_say_their_layer_and_spec() -> None:
    page = Page(render_html(full_records(), "A run"))
    plans = [record for record in full_records() if record.get("layers") and record.get("method") in ("exact", "kvmix")]
    titles = [attrs["title"] for attrs in page.all("td") if (attrs.get("title") or "").startswith("Layer")]
    assert len(titles) == sum(2 * len(plan["layers"]) for plan in plans)
    first = plans[0]["layers"][0]
    assert f"Layer 0 keys: {first['key']}" in titles
    assert f"Layer 0 values: {first['value']}" in titles


def table_cells(html: str, name: str) -> list[str]:
    (row,) = [row for row in re.findall(r"<tr class.*?</tr>", html, re.DOTALL) if f">{name}</th>" in row]
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
    return [re.sub(r"<svg.*?</svg>|<[^>]+>", "", cell, flags=re.DOTALL).strip() for cell in cells]


def test_absent_figures_are_dashes(html: str) -> None:
    assert table_cells(html, "exact 3.5")[-1] == "33.4"
    records = copy.deepcopy(full_records())
    for record in records:
        if record["kind"] == "fidelity" and record["name"] == "exact 3.5":
            record.update(kld={"value": math.nan, "low": None, "high": None}, ppl=None, live_bytes=None)
            record["layers"][3]["key_bits"] = None
    records = [record for record in records if record["kind"] != "decode"]
    broken = render_html(records, "A run")
    Page(broken)
    assert table_cells(broken, "exact 3.5") == ["3.5", "exact 3.5", "3.49", "–", "–", "0.224", "–", "87.2 %", "–"]
    assert not re.search(r"\b(nan|None)\b", broken.split("<script>")[0])


def test_bare_records_are_enough() -> None:
    bare: list[Record] = [
        {"kind": "fidelity", "name": "a"},
        {"kind": "decode", "name": "a"},
        {"kind": "sample", "name": "a"},
        {"kind": "needle", "name": "a", "cases": [None, {"tokens": 10}, {"tokens": 10, "depth": 0.5, "found": True}]},
        {"kind": "signal"},
        {"kind": "signal", "layers": [0, 1], "gradient": {"key": [None, 2.0]}},
        {"kind": "fidelity", "name": "b", "method": "new", "true_bits": 2.0, "kld": 0.5, "layers": [{"layer": 0}]},
    ]
    page = Page(render_html(bare, "Bare"))
    assert {"pareto", "results", "bits", "signal", "needle", "samples"} <= set(page.ids())


def test_runs_that_do_not_compare_have_parts_of_their_own() -> None:
    other = [{**record, "model": "another model"} for record in full_records()]
    page = Page(render_html([*full_records(), *other], "Two"))
    assert len(page.all("table", "results")) == 2
    assert len(page.all("svg", "wide")) == 4
    assert len(page.all("p", "lead")) == 2


def test_samples_mark_where_they_leave_the_dense_text() -> None:
    texts = {"dense": "one two three", "same": "one two three", "exact": "one two thirty", "quanto": "none"}
    records = [
        {"kind": "sample", "name": name, "method": name, "prompt": "p", "text": f" {text}"}
        for name, text in texts.items()
    ]
    html = render_html(records, "Samples")
    Page(html)
    assert re.findall(r"<mark>(.*?)</mark>", html) == ["thirty", "none"]
    assert "Same text as the dense cache" in html
    assert "Same as the dense cache for 2 words" in html
    assert "Differs from the dense cache at once" in html


def test_needles_of_several_seeds_show_their_share() -> None:
    cases = [{"tokens": 1024, "depth": 0.5, "found": found} for found in (True, False)]
    cases.append({"tokens": 2048, "depth": 0.9, "found": False})
    html = render_html([{"kind": "needle", "name": "dense", "method": "dense", "cases": cases}], "Needles")
    assert '<td class="part" title="1,024 tokens, depth 50 %: 1 of 2 found">1/2</td>' in html
    assert '<td class="miss" title="2,048 tokens, depth 90 %: missed">missed</td>' in html
    assert '<td class="none" title="1,024 tokens, depth 90 %: not run">–</td>' in html
    assert "1 of 3 found" in html


def plot_of(points: list[Datum], y_axis: Axis, *rules: Rule) -> Plot:
    series = Series("s", Style("exact", "circle"), tuple(points), ())
    return Plot("name", "title", "label", (series,), Axis("x"), y_axis, rules)


def chart_of(points: list[Datum], y_axis: Axis) -> list[tuple[float, float]]:
    chart = draw(plot_of(points, y_axis), NARROW)
    frame = chart.frame
    for tick in chart.y_ticks:
        assert frame.top <= tick.at <= frame.height - frame.bottom
    assert sum(bool(tick.label) for tick in chart.y_ticks) >= 1
    return [(mark.x, mark.y) for mark in chart.drawn[0].marks]


def test_only_rules_among_the_points_are_drawn() -> None:
    rules = [Rule(y, f"at {y}") for y in (0.1, 2.0, 99.0)]
    chart = draw(plot_of([Datum(1.0, 1.0, ""), Datum(2.0, 3.0, "")], Axis("y"), *rules), NARROW)
    assert [level.label for level in chart.levels] == ["at 2.0"]
    assert chart.place(1.0, 2.0)[1] == chart.levels[0].at


@pytest.mark.parametrize("crowd", [[], [1.0], [1.0, 9.0]])
def test_labels_of_rules_keep_clear_of_points(crowd: list[float]) -> None:
    points = [Datum(0.5, 9.0, ""), Datum(9.5, 0.0, ""), *(Datum(x, 5.1, "") for x in crowd)]
    chart = draw(plot_of(points, Axis("y"), Rule(5.0, "a level")), NARROW)
    (level,) = chart.levels
    for mark in chart.drawn[0].marks:
        assert not (level.x < mark.x < level.x + 50 and level.y - 12 < mark.y < level.y)
    assert (level.y < level.at) is (len(crowd) < 2)
    assert (level.x < NARROW.width / 2) is (len(crowd) != 1)


def test_the_margin_has_room_for_the_longest_label() -> None:
    long = Axis("y", write=lambda value: f"{value:012.1f}")
    narrow, wide = (draw(plot_of([Datum(1.0, 1.0, ""), Datum(2.0, 2.0, "")], y), NARROW) for y in (Axis("y"), long))
    assert narrow.frame == NARROW
    assert wide.frame.left >= 12 * 7
    assert wide.drawn[0].marks[0].x >= wide.frame.left


def test_doubling_axes_have_powers_of_two() -> None:
    axis = Axis("y", log=True, doubling=True, write=lambda value: f"{value:g}")
    chart = draw(plot_of([Datum(1.0, 1000.0, ""), Datum(2.0, 5000.0, "")], axis), NARROW)
    assert [tick.label for tick in chart.y_ticks] == ["1024", "2048", "4096"]


def test_log_axes_place_by_ratio() -> None:
    marks = chart_of([Datum(x, 10.0**-x, "", low=0.0, high=1.0) for x in (1.0, 2.0, 3.0)], Axis("y", log=True))
    gaps = [below[1] - above[1] for above, below in pairwise(marks)]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.2)
    assert gaps[0] > 20


def test_one_point_and_equal_points_can_be_drawn() -> None:
    for axis in (Axis("y", log=True), Axis("y"), Axis("y", from_zero=True)):
        (mark,) = chart_of([Datum(3.0, 0.5, "")], axis)
        assert NARROW.left <= mark[0] <= NARROW.width
        assert len(chart_of([Datum(3.0, 0.5, "")] * 3, axis)) == 3
