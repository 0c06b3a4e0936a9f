"""`kvloom report` and `kvloom explore`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom import _extras
from kvloom.plan import Fingerprint
from kvloom.report import load_records
from kvloom.signals import Calibration, LossTable, Profile, default_specs
from tests.report.synthetic import every_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "all.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in every_record()), encoding="utf-8")
    return path.parent


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    from kvloom.assets import shape_config

    model = Fingerprint.of(shape_config("llama-3.1-8b"))
    keys, values = default_specs(model.head_dim)
    rows = [[(layer + 1) * 4.0**-spec.bits for spec in keys] for layer in model.packed_layers]
    table = LossTable(
        model=model,
        layers=list(model.packed_layers),
        key_specs=keys,
        value_specs=values,
        key_loss=rows,
        value_loss=rows,
        key_spread=rows,
        value_spread=rows,
    )
    calibration = Calibration(sha256="0" * 64, texts=[], prompts=1, tokens=64, seed=0)
    path = tmp_path / "profile.json"
    Profile(model=model, gradient=None, table=table, calibration=calibration, seconds=1.0).save(path)
    return path


def test_a_report_of_everything(kvloom, runs: Path, profile: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    page, charts = tmp_path / "r.html", tmp_path / "charts"
    done = kvloom("report", runs, "-o", page, "--profile", profile, "--png", charts, "--title", "Mine")
    assert done.exit_code == 0, done.output
    html = page.read_text(encoding="utf-8")
    assert "<title>Mine</title>" in html
    assert html.count('type="range"') == 2
    names = {path.name for path in charts.iterdir()}
    assert {"pareto-1.png", "explore-2.png"} <= names
    assert f"wrote {page} and {len(names)} charts to {charts}" in done.stdout
    assert len(load_records(runs)) == len(every_record())


def test_charts_without_matplotlib_are_one_line(kvloom, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extras, "_found", lambda module: module != "matplotlib")
    failed = kvloom("report", runs, "-o", tmp_path / "r.html", "--png", tmp_path / "charts")
    assert failed.exit_code == 2
    assert failed.stderr == "error: Drawing charts as PNG needs matplotlib: run pip install 'kvloom[plot]'.\n"
    assert not (tmp_path / "r.html").exists()


def test_a_model_without_a_profile_is_refused(kvloom, runs: Path):
    failed = kvloom("report", runs, "--model", "smollm2-135m")
    assert failed.exit_code == 2
    assert "--model is that of --profile" in failed.stderr


def test_explore_writes_every_plan(kvloom, profile: Path, tmp_path: Path):
    page = tmp_path / "e.html"
    done = kvloom("explore", profile, "-o", page, "--tokens", "4K")
    assert done.exit_code == 0, done.output
    html = page.read_text(encoding="utf-8")
    assert "Cache at 4K" in html
    assert "by itself" in html
    plans = json.loads(html.split('type="application/json">')[1].split("</script>")[0])["plans"]
    assert done.stdout == f"wrote {page} with {len(plans)} plans\n"
    assert len(plans) > 50


def test_explore_refuses_another_model(kvloom, profile: Path, fetched):
    failed = kvloom("explore", profile, "--model", "smollm2-135m")
    assert failed.exit_code == 2
    assert "the plan is for num_layers = 32 and this model has 30" in failed.stderr
