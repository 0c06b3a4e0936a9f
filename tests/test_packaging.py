from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import kvloom
from kvloom import _extras
from kvloom.errors import MissingExtraError

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "pydantic", "scipy", "numpy", "jinja2", "typer", "rich"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_import_is_light():
    assert not modules_after("import kvloom") & HEAVY


def test_cli_help_is_light():
    loaded = modules_after("import kvloom.cli")
    assert not loaded & {"torch", "transformers", "scipy"}


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", kvloom.__version__)
    assert importlib.metadata.version("kvloom") == kvloom.__version__


def test_every_public_name_is_there_and_loads_lazily():
    assert set(kvloom.__all__) == {*kvloom._HOMES, "__version__"}
    for name in [*kvloom.__all__, *kvloom.__all__]:  # twice: a room of that name is loaded by now
        assert not isinstance(getattr(kvloom, name), ModuleType), f"kvloom.{name} is a module"
    with pytest.raises(AttributeError, match="weave"):
        kvloom.weave  # noqa: B018


def test_extras_are_those_of_pyproject():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = declared["optional-dependencies"]
    assert set(_extras.EXTRAS) == set(optional) - {"all", "test", "dev"}
    together = [extra for extra in _extras.EXTRAS if extra != "vllm"]  # which asks for a torch of its own
    assert optional["all"] == [f"kvloom[{','.join(together)}]"]
    for extra, modules in _extras.EXTRAS.items():
        packages = {re.split(r"[\[<>=]", requirement)[0] for requirement in optional[extra]}
        assert packages == {re.sub(r"[._]", "-", module) for module in modules}


def test_an_absent_extra_is_one_sentence_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(_extras.EXTRAS, "ghost", ("no_such_module", "no.such.module"))
    assert _extras.missing("ghost") == ("no_such_module", "no.such.module")
    with pytest.raises(
        MissingExtraError,
        match=r"^Weaving needs no_such_module and no\.such\.module: "
        r"run pip install 'kvloom\[ghost\]'\.$",
    ):
        _extras.require("ghost", "Weaving")


def test_a_present_extra_is_its_first_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(_extras.EXTRAS, "there", ("json", "importlib.metadata"))
    assert _extras.missing("there") == ()
    assert _extras.require("there", "Weaving") is json


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    package = ROOT / "kvloom"
    expected = {
        file.relative_to(ROOT).as_posix()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == expected
    assert "kvloom/py.typed" in inside
    assert "kvloom = kvloom.cli:main" in scripts
    assert "[lm_eval.models]\nkvloom = kvloom.integrations.lm_eval:KvloomLM" in scripts
    assert "[vllm.general_plugins]\nkvloom = kvloom.integrations.vllm:register" in scripts
