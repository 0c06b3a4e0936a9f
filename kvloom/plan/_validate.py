"""Validation whose errors are one sentence that names the field."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvloom.errors import PlanError

M = TypeVar("M", bound=BaseModel)


def validated(kind: type[M], data: Any, where: str) -> M:
    """``data`` as a ``kind``.

    Raises:
        PlanError: It is not one; the message starts with ``where`` and names the field.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise PlanError(explain(error, where)) from None


def once(pairs: Iterable[tuple[Hashable, Any]], where: str) -> dict[Any, Any]:
    """A JSON object or a YAML mapping that names everything once.

    Raises:
        PlanError: It names something twice, of which only one would count; the message starts with ``where``.
    """
    found: dict[Hashable, Any] = {}
    for name, value in pairs:
        if name in found:
            raise PlanError(f"{where}: {name} is given twice in one place: keep one of the two.")
        found[name] = value
    return found


def explain(error: ValidationError, where: str) -> str:
    """First problem of a validation error as one sentence that names the field."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the whole"
    text = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if problem["type"] == "extra_forbidden":
        text = "nothing is known by this name: check its spelling or remove it"
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    more = f"; {error.error_count() - 1} more problem(s)" if error.error_count() > 1 else ""
    return f"{where}: field {field}: {text}{shown}{more}."
