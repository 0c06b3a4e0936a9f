"""Commands that torchrun starts in several processes: one of them speaks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def speaks() -> bool:
    """Whether this process prints: the first one of those that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def hush() -> None:
    """Let nothing of this process be printed on stdout, unless it `speaks`; errors go to stderr from all."""
    if not speaks():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


def part() -> None:
    """Leave the other processes at the end: one whose threads still wait for others may abort while it exits.

    On GPUs a group is left to the driver: NCCL would wait for graphs that hold its sums.
    """
    distributed: Any = getattr(sys.modules.get("torch"), "distributed", None)
    is_grouped = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_grouped and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
