"""Into and out of foreign formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._plan import Plan, Provenance
from kvloom.plan.formats._base import get
from kvloom.plan.formats._deviations import Deviations
from kvloom.plan.formats._document import read_document


@dataclass(frozen=True)
class Exported:
    """A plan in a foreign format.

    Attributes:
        text: What its file holds.
        notes: A sentence for everything that the other side does otherwise.
    """

    text: str
    notes: tuple[str, ...]


def import_plan(
    source: str | Path | Mapping[Any, Any] | Sequence[Any] | object,
    format: str,
    model: Any,
    *,
    substitute: bool = False,
) -> Plan:
    """The plan that a foreign configuration means.

    Args:
        source: A JSON or YAML file, or what one holds; or a configuration object, whose attributes are its fields.
        format: One of `readable_formats`.
        model: A transformers model or config, or a `Fingerprint`.
        substitute: Take the nearest format or window where a plan cannot say what the source says.

    Returns:
        A plan whose ``provenance.notes`` say what the source does otherwise.

    Raises:
        PlanError: The file cannot be read, a field is unknown or wrong, or says what a plan cannot.
        ModelError: The source is for another model.
    """
    deviations = Deviations(substitute)
    plan = get(format).read(_document(source), Fingerprint.of_any(model), deviations)
    if plan.tensors and isinstance(source, str | Path):
        plan.tensors.locate(Path(source).parent)
    if plan.provenance is not None:
        return plan
    return plan.model_copy(update={"provenance": Provenance(source=format, notes=tuple(deviations.notes))})


def _document(source: object) -> Any:
    if isinstance(source, str | Path):
        return read_document(source)
    return source if isinstance(source, Mapping | Sequence) or not hasattr(source, "__dict__") else vars(source)


def export_plan(plan: Plan, format: str, *, substitute: bool = False) -> Exported:
    """``plan`` in a foreign format.

    Args:
        plan: What to say.
        format: One of `writable_formats`.
        substitute: Take the nearest that the format can say.

    Raises:
        PlanError: The format has no writer, or cannot say something of the plan.
    """
    deviations = Deviations(substitute)
    text = get(format).write(plan, deviations)
    return Exported(text, tuple(deviations.notes))
