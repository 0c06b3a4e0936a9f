"""From one plan file to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvloom.plan._plan import Plan
from kvloom.plan.formats._import import export_plan, import_plan
from kvloom.plan.formats._presets import preset

PRESET = "preset"


def convert(
    source: str | Path,
    target: str | Path,
    model: Any,
    *,
    source_format: str = "kvloom",
    target_format: str = "kvloom",
    substitute: bool = False,
) -> tuple[str, ...]:
    """Write the plan in ``source`` to ``target`` in another format.

    Args:
        source: A file, or the name of a preset where ``source_format`` is ``preset``.
        target: The file to write.
        model: A transformers model or config, or a `Fingerprint`.
        source_format: ``preset`` or one of `readable_formats`.
        target_format: One of `writable_formats`.
        substitute: Take the nearest format or window where a side cannot say it.

    Returns:
        A sentence for everything that a side does otherwise.

    Raises:
        PlanError: See `import_plan`, `preset` and `export_plan`; nothing is written.
        ModelError: The source is for another model.
        OSError: The target cannot be written.
    """
    plan = _read(source, source_format, model, substitute)
    exported = export_plan(plan, target_format, substitute=substitute)
    Path(target).write_text(exported.text, encoding="utf-8")
    notes = plan.provenance.notes if plan.provenance else ()
    return tuple(dict.fromkeys([*notes, *exported.notes]))


def _read(source: str | Path, form: str, model: Any, substitute: bool) -> Plan:
    if form == PRESET:
        return preset(str(source), model)
    return import_plan(Path(source), form, model, substitute=substitute)
