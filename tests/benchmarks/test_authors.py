"""Codecs beside their authors' quantisers: the formulas by hand, the rows that need no library, the kept page."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import authors, formulas
from benchmarks.authors import BEGIN, BLOCK, END, KEPT, LAYERS, PAGE, States
from benchmarks.methods import between
from kvloom.errors import DataError
from kvloom.plan import TensorSpec
from tests.benchmarks.test_methods import SMOLLM2

LIBRARYLESS = (authors.kivi, authors.kvtuner, authors.kvmix, authors.rotated, authors.clipped)


def rows_of(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def same(made: torch.Tensor, *numbers: float) -> None:
    torch.testing.assert_close(made, rows_of(*numbers))


def test_min_max_by_hand() -> None:
    same(formulas.min_max(rows_of(-1, 0.4, 2, 5), 2), -1, 1, 3, 5)  # halves to the even code
    same(formulas.min_max(rows_of(3, 3), 4), 3, 3)


def test_the_eleventh_is_cut_off() -> None:
    rows = rows_of(0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7)
    same(formulas.eleven(rows), 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 3)


def test_kvtuners_grids_have_a_level_at_zero() -> None:
    same(formulas.kvtuner_asymmetric(rows_of(-1, 0.1, 0.6, 2), 2), -1, 0, 1, 2)
    same(formulas.kvtuner_asymmetric(rows_of(-1.4, 0.1, 0.6, 1.6), 2), -1, 0, 1, 2)  # step 1, from round(-1.4) = -1
    same(formulas.kvtuner_symmetric(rows_of(-3, -1, 2, 0.5), 2), -3, 0, 3, 0)


def test_groups_are_channels_of_a_token_or_tokens_of_a_channel() -> None:
    x = torch.arange(2 * 5 * 4, dtype=torch.float64).view(2, 5, 4)
    means = {
        grouping: formulas.in_groups(x, grouping, 2, lambda rows: rows.mean(-1, keepdim=True).expand_as(rows))
        for grouping in ("per_token", "per_channel")
    }
    assert means["per_token"][1, 3].tolist() == [32.5, 32.5, 34.5, 34.5]
    assert means["per_channel"][1, :, 2].tolist() == [24, 24, 32, 32, 38]  # the last token fills no group


def test_the_search_is_never_worse_than_its_first_range() -> None:
    rows = torch.randn(100, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    clipped, plain = (((f(rows, 2) - rows) ** 2).sum(-1) for f in (formulas.awq_clipped, formulas.min_max))
    assert bool((clipped <= plain).all())
    assert float(clipped.sum()) < 0.9 * float(plain.sum())


def test_rotations_are_orthogonal_and_points_are_those_of_a_sphere() -> None:
    turn = formulas.hadamard(64)
    torch.testing.assert_close(turn @ turn.T, torch.eye(64, dtype=torch.float64))
    normal = torch.tensor([-1.510418, -0.452780, 0.452780, 1.510418], dtype=torch.float64)
    assert float((formulas.sphere_points(1024, 2) * 32 - normal).abs().max()) < 0.01
    x = torch.randn(2, 300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off = (formulas.turboquant_mse(x, 2) - x).norm() / x.norm()
    assert float(off) ** 2 == pytest.approx(0.1175, rel=0.05)  # what the grid loses of normal numbers


def test_kvquant_keeps_outliers_and_ends() -> None:
    vectors = torch.cat([torch.linspace(-1, 1, 197, dtype=torch.float64), rows_of(50, -40)[0]])[None]
    low, high = formulas.kvquant_range(vectors, 0.01)
    assert (float(low), float(high)) == (-1, 1)
    points = torch.tensor([-1, 0, 1], dtype=torch.float64)
    decoded = formulas.kvquant(vectors, low, high, points, 0.01)
    assert decoded[0, -2:].tolist() == [50, -40]
    assert set(decoded[0, :-2].tolist()) == {-1, 0, 1}
    assert formulas.kvquant_range(vectors, 0.0) == (vectors.amin(), vectors.amax())
    halves = formulas.kvquant_points(vectors, torch.ones_like(vectors), 1, 0.01)
    assert halves.tolist() == pytest.approx([-0.5, 0.5], rel=0.02)


def random_states() -> States:
    x = torch.randn(3, 1, 2 * BLOCK, 64, generator=torch.Generator().manual_seed(0))
    return States(LAYERS[0], *x.unbind())


@pytest.mark.parametrize("make", LIBRARYLESS)
def test_rows_without_a_library_are_within_a_percent_of_their_formula_or_better(make) -> None:
    states = random_states()
    for row in make(SMOLLM2):
        record = authors.measured(row, [states])
        for side in row.bits:
            assert record[side]["ratio"]["value"] < 1.01, (row.name, side)
            assert record[side]["bits"][0] == pytest.approx(row.bits[side], rel=0.04), (row.name, side)


def test_errors_are_of_blocks() -> None:
    x = torch.ones(2, 2 * BLOCK, 4)
    off = torch.zeros_like(x)
    off[1, BLOCK:] = 0.25
    assert authors.block_errors(x, x + off).tolist() == [0, 0, 0, 0.25]


def side(ratio: float, ours: float, high: float) -> dict:
    label = TensorSpec(bits=2, grouping="per_channel").label
    theirs = {"value": ours / ratio, "low": 0.0, "high": high}
    figure = {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
    return {"label": label, "bits": [2.5, 2.25], "ours": {"value": ours}, "theirs": theirs, "ratio": figure}


def test_the_table_says_who_is_better_and_counts() -> None:
    record = {"name": "a", "source": "b", "by": "formula", "key": side(1.02, 0.2, 0.3)}
    worse = {**record, "name": "c", "key": side(1.5, 0.2, 0.15), "value": side(0.9, 0.1, 0.1)}
    results = {"model": "M", "layers": [0, 1], "windows": 2, "tokens": 2048, "rows": [record, worse]}
    lines = authors.table(results).split("\n")
    figures = "0.200 | 0.196 | 1.020 [1.010, 1.030] | 2.50: 2.25"
    assert lines[2] == f"| a | b | formula | `2b/ch64` | {figures} |  |  |  |  |  |"
    assert "| **1.500 [1.490, 1.510]** |" in lines[3]
    assert "Of 3 sides 1 are at most theirs, 1 above it and within" in " ".join(lines).replace("\n", " ")


def test_the_page_holds_what_the_script_makes_of_the_kept_results() -> None:
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    assert KEPT.read_text(encoding="utf-8") == authors.kept_text(results)
    assert between(PAGE.read_text(encoding="utf-8"), BEGIN, END)[1] == authors.table(results)


def test_no_row_is_worse_than_its_authors() -> None:
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    verdicts = {
        (row["name"], side): authors.verdict(row[side])
        for row in results["rows"]
        for side in authors.SIDES
        if side in row
    }
    assert len(verdicts) > 100
    assert not [place for place, verdict in verdicts.items() if verdict == "worse"]


def test_a_page_without_results_or_markers_is_refused(tmp_path) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text("# A title\n")
    with pytest.raises(DataError, match=r"run python -m benchmarks\.authors"):
        authors.write_docs(kept, page)
    kept.write_text(KEPT.read_text(encoding="utf-8"))
    with pytest.raises(DataError, match="once"):
        authors.write_docs(kept, page)
