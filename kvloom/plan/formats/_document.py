"""Reading foreign files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvloom.errors import PlanError


def read_document(path: str | Path) -> Any:
    """What a ``.json`` file, or any other as YAML, holds.

    Raises:
        PlanError: The file is missing, or cut short.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}.") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"{path} is cut short or another kind of file ({reason}).") from None


def is_table(document: Any) -> bool:
    """Whether all keys are layer numbers."""
    return isinstance(document, dict) and bool(document) and all(str(key).isdecimal() for key in document)
