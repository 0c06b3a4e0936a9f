"""The explorer: what the page shows at first, and what its script looks up."""

from __future__ import annotations

import json
import re

import pytest

from kvloom.report import render_html
from kvloom.report._explore import build_explorers
from tests.report.synthetic import LAYERS, front


def test_the_plan_nearest_to_three_bits_is_shown_first() -> None:
    (explorer,) = build_explorers([front()])
    assert (explorer.at, explorer.last) == (1, 2)
    assert explorer.facts[:3] == (("True bits", "3.00"), ("Bytes a token", "4,320"), ("Cache at 8K", "33.8 MiB"))
    assert explorer.fits == (("24 GB", "8K"), ("48 GB", "1M"), ("80 GB", "no context"))
    assert [track.label for track in explorer.tracks] == ["K", "V"]
    assert {cell.text for cell in explorer.tracks[0].cells} == {"3"}
    assert explorer.tracks[1].cells[2].title == "Layer 2: 4b/tok-head"
    assert [shade.text for shade in explorer.shades] == ["2", "3", "4", "16"]


@pytest.mark.parametrize("heads", [1, 3])
def test_every_plan_is_in_the_page(heads: int) -> None:
    record = front(heads)
    html = render_html([record], "Explore")
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    data = json.loads(text)
    assert len(data["plans"]) == 3
    for plan, shown in zip(record["plans"], data["plans"], strict=True):
        cells = [data["formats"][place] for place in shown["cells"]]
        assert len(cells) == 2 * heads * LAYERS
        keys, values = cells[: heads * LAYERS], cells[heads * LAYERS :]
        for head in range(heads):
            for layer in range(LAYERS):
                at = head * LAYERS + layer
                assert keys[at][2] == record["key_specs"][plan["keys"][layer][head]]["label"]
                assert values[at][2] == record["value_specs"][plan["values"][layer][head]]["label"]
    assert html.count("<td class=") == 2 * heads * LAYERS
    assert "kvloom <span>explore</span>" in html
    assert "nothing is claimed" not in html


def test_a_plan_of_no_loss_lies_on_the_axis() -> None:
    (explorer,) = build_explorers([front()])
    assert len(explorer.plot.series[0].line) == 2
    for chart, places in zip(explorer.plot.charts, explorer.data["places"], strict=True):
        assert places[5] == chart.frame.height - chart.frame.bottom
        assert places[1] < places[3] < places[5]


def test_a_front_without_weights_says_so() -> None:
    (explorer,) = build_explorers([{**front(), "weight_bytes": None, "reads_at_most": None}])
    assert "by itself" in explorer.caption
    assert "reads at most" not in explorer.caption
