"""Where kvloom keeps what it downloads, converts and compiles."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """The folder of downloads and builds: `$KVLOOM_CACHE`, else `kvloom` in the platform's cache."""
    if chosen := os.environ.get("KVLOOM_CACHE"):
        return Path(chosen).expanduser()
    return _platform_cache() / "kvloom"


def build_once(target: Path, build: Callable[[Path], None]) -> bool:
    """Let `build` fill a new folder, then move it to `target` in one step.

    A reader never sees a half-filled `target`: `build` works on a temporary folder beside it. When
    two processes build at the same time, the first one's folder stays.

    Returns:
        Whether anything was built; False when `target` was already there.
    """
    if target.is_dir():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def write_once(target: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees all of it or nothing, also when several processes write the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(scratch).replace(target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _platform_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
