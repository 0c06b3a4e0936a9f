"""Every registered signal passes the conformance suite."""

from __future__ import annotations

import pytest

from kvloom import signals
from kvloom.testing import check_signal


@pytest.mark.parametrize("name", signals.signals())
def test_signal(name: str) -> None:
    check_signal(signals.get(name))
    assert name in signals.signals()
