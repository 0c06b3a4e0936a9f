"""What is said of a name that nothing has."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_FEW, _NEAREST = 12, 3


def unknown(what: str, name: str, known: Iterable[str], *, listing: str | None = None, also: Iterable[str] = ()) -> str:
    """A sentence that names the nearest names first, and all of them if they are few.

    Args:
        what: What has such names: ``preset``.
        name: What was given.
        known: The names there are.
        listing: Where to see them all, if they are many: ``kvloom.plan.presets()``.
        also: Names to come near to that are not listed.
    """
    names, spelled = list(known), {it.lower(): it for it in (*known, *also)}
    few = len(names) <= _FEW
    near = [it for it in spelled if name and name.lower() in it]
    near += get_close_matches(name.lower(), spelled, _NEAREST, 0.5 if few or listing else 0.0)
    nearest = [spelled[it] for it in dict.fromkeys(near)][:_NEAREST]
    shown = nearest + [it for it in names if it not in nearest] if few else nearest
    all_of_them = [f"{listing} lists all"] if listing and not few else []
    choice = [f"choose one of {', '.join(shown)}"] if shown else []
    return f"{what} {name!r} is unknown; {'; '.join(choice + all_of_them)}."
