"""The page in a headless Chromium: charts drawn, nothing on the console, keyboard, phone, dark, 200 runs at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.report import render_html
from tests.report.browser import CHROMIUM, Browser
from tests.report.synthetic import Record, every_record, fidelity, front, task

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html([*every_record(), front(heads=3)], "A run"), encoding="utf-8")
    return path


def many_runs() -> list[Record]:
    """200 plans with their fidelity, and their answers to a task."""
    bits = [1.5 + n / 50 for n in range(200)]
    scored = [fidelity(f"plan {n}", "exact", held, held, 2.0 ** (1 - 2 * held)) for n, held in enumerate(bits)]
    answered = [task(f"plan {n}", "exact", held, "gsm8k", [n % 2, 1, 0]) for n, held in enumerate(bits)]
    return [*every_record(), *scored, *answered]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_charts_are_drawn_without_a_word_on_the_console(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme=scheme)
    assert browser.messages == []
    assert browser.requests == [page.as_uri()]
    browser.unfold()
    assert browser.js("document.documentElement.scrollWidth") == width, "the page is wider than the window"
    seen = browser.js(
        "[...document.querySelectorAll('.chart')].filter((it) => it.checkVisibility()).map((it) => {"
        "const box = it.getBoundingClientRect();"
        "return [box.width, box.height, it.querySelectorAll('.point, .line').length] })"
    )
    assert len(seen) == len(browser.js("[...document.querySelectorAll('.narrow')].map(() => 1)"))
    assert all(drawn > 0 and 250 < across <= width and down > 200 for across, down, drawn in seen)
    dark = browser.js("getComputedStyle(document.body).backgroundColor") != "rgb(252, 252, 251)"
    assert dark is (scheme == "dark")


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_an_axis_do_not_overlap(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.unfold()
    overlaps = browser.js(
        "[...document.querySelectorAll('.chart')].filter((it) => it.checkVisibility()).flatMap((chart) => {"
        "const boxes = [...chart.querySelectorAll('.tick')].map((it) => it.getBoundingClientRect());"
        "return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>"
        "a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)"
        ".map(() => chart.getAttribute('aria-label'))) })"
    )
    assert overlaps == []


def readout(browser: Browser) -> list[str]:
    return browser.js(
        "[...document.querySelectorAll('#front-1 [data-fact], #front-1 [data-fit]')].map((it) => it.textContent)"
    )


def test_arrow_keys_change_the_plan(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.js("document.querySelector('#front-1 input').focus()")
    assert readout(browser)[0] == "3.00"
    browser.key("ArrowRight")
    assert readout(browser) == ["4.00", "5,760", "45.0 MiB", "4.00×", "0", "7K", "1M", "no context"]
    cells = browser.js("[...document.querySelectorAll('#front-1 td')].map((it) => it.textContent + it.className)")
    assert set(cells[:30]) == {"4b4"}
    assert set(cells[30:]) == {"16b16"}
    assert browser.js("document.activeElement.getAttribute('aria-valuetext')").startswith("4.00 true bits")
    browser.key("Home")
    assert readout(browser)[0] == "2.00"
    browser.key("End")
    assert readout(browser)[0] == "4.00"
    assert browser.messages == []


def test_the_chart_of_the_front_can_be_dragged(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.js("document.querySelector('#front-1 .wide').scrollIntoView({block: 'center'})")
    box = browser.js("(() => { const b = document.querySelector('#front-1 .wide').getBoundingClientRect();"
                     "return [b.left, b.top, b.width, b.height] })()")  # fmt: skip
    at = {"y": box[1] + box[3] / 2, "button": "left", "buttons": 1}
    browser.call("Input.dispatchMouseEvent", type="mousePressed", x=box[0] + 80, clickCount=1, **at)
    assert readout(browser)[0] == "2.00"
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] - 20, **at)
    assert readout(browser)[0] == "4.00"


def test_arrow_keys_move_between_points(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.js("document.querySelector('#tasks .narrow .point').focus()")
    first = browser.js("document.getElementById('tip').textContent")
    browser.key("ArrowRight")
    second = browser.js("document.getElementById('tip').textContent")
    assert first.startswith("short plan")
    assert second.startswith("long plan")


def test_200_runs_open_within_a_second(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    path.write_text(render_html(many_runs(), "Many"), encoding="utf-8")
    browser.open(path)
    assert browser.seconds() < 1
    assert browser.js("document.querySelectorAll('.results tbody tr').length") > 200
    assert browser.messages == []
