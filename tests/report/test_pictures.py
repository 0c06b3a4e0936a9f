"""Charts as PNG files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom import _extras
from kvloom.errors import MissingExtraError
from kvloom.report import save_pictures
from tests.report.synthetic import every_record


def test_every_chart_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = save_pictures(every_record(), tmp_path / "charts")
    parts = ("pareto", "tasks", "drift", "explore", "memory", "signal", "ranking", "kernels", "bits")
    names = [f"{part}-1.png" for part in parts]
    assert [file.name for file in files] == [*names[:2], "tasks-2.png", *names[2:]]
    assert sorted((tmp_path / "charts").iterdir()) == sorted(files)
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in files)


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras, "_found", lambda module: module != "matplotlib")
    with pytest.raises(MissingExtraError, match=r"pip install 'kvloom\[plot\]'"):
        save_pictures(every_record(), tmp_path / "charts")
    assert not (tmp_path / "charts").exists()
