from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvloom import __version__, _extras
from kvloom.cli import main
from kvloom.errors import DataError, PlanError

COMMANDS = ["fetch", "doctor", "profile", "plan", "convert", "show", "schema", "generate", "eval"]
COMMANDS += ["lm-eval", "report", "explore", "demo"]


def test_help_lists_every_command(kvloom):
    shown = kvloom("--help")
    assert shown.exit_code == 0
    assert all(f" {command} " in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(kvloom, command: str):
    shown = kvloom(command, "--help")
    assert shown.exit_code == 0
    assert f"kvloom {command}" in shown.stdout


def test_version(kvloom):
    assert kvloom("--version").stdout == f"kvloom {__version__}\n"


def test_an_expected_error_is_one_line_and_exit_code_2(kvloom):
    failed = kvloom("show", "absent.json")
    assert failed.exit_code == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert "absent.json" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_debug_lets_the_error_through(kvloom):
    assert isinstance(kvloom("--debug", "show", "absent.json").exception, PlanError)


def test_a_full_disk_or_a_folder_in_the_way_is_an_expected_error(kvloom, tmp_path):
    failed = kvloom("report", tmp_path / "absent", "-o", tmp_path)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")


def test_a_bug_is_not_hidden(kvloom, monkeypatch: pytest.MonkeyPatch):
    def broken(_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("kvloom.assets.fetch", broken)
    assert isinstance(kvloom("fetch").exception, AssertionError)


def test_fetch_prints_where_things_are(kvloom, monkeypatch: pytest.MonkeyPatch):
    def fetched(notify):
        notify("downloading")
        return "/a/model", "/a/text"

    monkeypatch.setattr("kvloom.assets.fetch", fetched)
    done = kvloom("fetch")
    assert done.stdout == "model  /a/model\ntexts  /a/text\n"
    assert "downloading" in done.stderr


def test_fetch_passes_on_its_error(kvloom, monkeypatch: pytest.MonkeyPatch):
    def failing(_: object) -> None:
        raise DataError("pip said no")

    monkeypatch.setattr("kvloom.assets.fetch", failing)
    assert kvloom("fetch").stderr == "error: pip said no\n"


def test_without_the_extra_main_says_which_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(_extras, "_found", lambda module: module != "typer")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == ("error: The kvloom command needs typer: run pip install 'kvloom[cli]'.\n")


def test_the_installed_command_runs():
    code = "import sys; sys.argv = ['kvloom', '--version']; from kvloom.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"kvloom {__version__}\n"


def test_demo_prints_the_table_the_notes_and_the_page(kvloom, monkeypatch: pytest.MonkeyPatch, tmp_path):
    def run_demo(out, *, model, progress):
        progress("working", 0, 0)
        progress("working", 1, 2)
        return SimpleNamespace(table=f"table of {model}", notes=("note one", "note two"), page=out / "report.html")

    monkeypatch.setattr("kvloom.demo.run_demo", run_demo)
    done = kvloom("demo", "-o", tmp_path)
    assert done.exit_code == 0, done.output
    lines = ["table of smollm2-135m", "", "note one", "note two", "", f"wrote {tmp_path / 'report.html'}"]
    assert done.stdout.splitlines() == lines
