"""Reading foreign files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from kvloom.errors import PlanError
from kvloom.plan._validate import once


def read_document(path: str | Path) -> Any:
    """What a ``.json`` file, or any other as YAML, holds.

    Raises:
        PlanError: The file is missing or cut short, or gives something twice.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}.") from None
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=partial(once, where=str(path)))
        return _from_yaml(text, str(path))
    except PlanError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"{path} is cut short or another kind of file ({reason}).") from None


def _from_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; raises PlanError if a mapping gives something twice, see `once`."""
    from yaml import MappingNode, SafeLoader, load

    class Once(SafeLoader):  # type: ignore[misc]  # yaml has no types
        def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
            once(((key.value, None) for key, _ in node.value if isinstance(key.value, str)), where)
            built: dict[Any, Any] = super().construct_mapping(node, deep)
            return built

    return load(text, Once)


def is_table(document: Any) -> bool:
    """Whether all keys are layer numbers."""
    return isinstance(document, dict) and bool(document) and all(str(key).isdecimal() for key in document)
