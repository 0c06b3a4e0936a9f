"""Shared by all tests: no network, the `gpu` marker, the packaged model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

# Machines that test are busy, so no deadlines; in CI the same examples every time.
settings.register_profile("kvloom", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("kvloom")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]  # keywords are names of folders, too
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def fetched() -> None:
    """What needs the packaged model and texts asks for this; `make test` fetches them first."""
    from kvloom.assets import essays_dir, model_dir

    if not (model_dir().is_dir() and essays_dir().is_dir()):
        pytest.skip("the packaged model is not fetched: run `make assets`")


@pytest.fixture(scope="session")
def smollm2(fetched: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged model in float32 on the CPU, and its tokenizer. Do not change it."""
    from kvloom.assets import load_model

    return load_model(device="cpu")


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Writes a file, as a user would between two runs, and gives the module read from it."""

    def read(source: str, name: str = "mine") -> ModuleType:
        path = tmp_path / "own" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of two sources with one date the first would stay
        spec.loader.exec_module(module)
        return module

    return read
