"""Only tests that are marked for a GPU are skipped without one."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import pytest_collection_modifyitems


def test_a_folder_named_gpu_marks_no_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    item = request.node
    item.keywords["gpu"] = True  # as pytest has it for the names of folders
    pytest_collection_modifyitems([item])
    assert not item.get_closest_marker("skip")
    item.add_marker("gpu")
    pytest_collection_modifyitems([item])
    assert item.get_closest_marker("skip")
