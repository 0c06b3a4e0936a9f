"""What a foreign plan format is, and the registry that finds one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from kvloom._names import unknown
from kvloom.errors import PlanError
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan
from kvloom.plan.formats._deviations import Deviations


class Document(BaseModel):
    """Base of what a foreign file holds: frozen, and a field nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanFormat(ABC):
    """One foreign way to say what a cache stores. Stateless; one file a format.

    Attributes:
        name: What `get` and the command line call it.
        writes: Whether `write` exists.
    """

    name: str
    writes: bool = False

    @abstractmethod
    def read(self, document: Any, model: Fingerprint, deviations: Deviations) -> Plan:
        """The plan that ``document`` (parsed JSON or YAML, or a Python dict) means for ``model``.

        Raises:
            PlanError: A field is unknown, wrong, or says what a plan cannot.
        """

    def write(self, plan: Plan, deviations: Deviations) -> str:
        """Text of a file that says what ``plan`` says.

        Raises:
            PlanError: The format has no writer, or cannot say it.
        """
        raise PlanError(f"format {self.name!r} is only read; write one of {', '.join(writable_formats())}.")


_FORMATS: dict[str, PlanFormat] = {}
F = TypeVar("F", bound=PlanFormat)


def register(form: F) -> F:
    """Make a format known by its name."""
    _FORMATS[form.name] = form
    return form


def get(name: str) -> PlanFormat:
    """The format called ``name``; raises PlanError naming the known ones."""
    if name not in _FORMATS:
        raise PlanError(unknown("format", name, readable_formats()))
    return _FORMATS[name]


def readable_formats() -> tuple[str, ...]:
    """Names of the formats plans are read from."""
    return tuple(sorted(_FORMATS))


def writable_formats() -> tuple[str, ...]:
    """Names of the formats plans are written to."""
    return tuple(name for name in readable_formats() if _FORMATS[name].writes)
