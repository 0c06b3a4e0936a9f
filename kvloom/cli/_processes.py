"""Commands that torchrun starts in several processes: one of them speaks."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def speaks() -> bool:
    """Whether this process prints: the first one of those that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def hush() -> None:
    """Let nothing of this process be printed on stdout, unless it `speaks`; errors go to stderr from all."""
    if not speaks():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
