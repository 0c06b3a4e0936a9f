from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from kvloom.cli._app import app

Kvloom = Callable[..., Result]


@pytest.fixture
def kvloom(monkeypatch: pytest.MonkeyPatch) -> Kvloom:
    """Run a command line in this process; the result has output, stdout, stderr and exit_code."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])
