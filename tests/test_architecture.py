"""The rooms of the house and the doors between them: imports go one way only.

Every import counts, also inside functions, under TYPE_CHECKING and through `importlib`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import kvloom

ROOT = Path(kvloom.__file__).parent
SHARED = {
    "errors",
    "_conditions",
    "_dtypes",
    "_extras",
    "_lazy",
    "_ledger",
    "_names",
    "_processes",
    "_sizes",
    "_userdir",
    "_version",
    "_vocabulary",
}
RUNTIME = {"plan", "pages", "codecs", "kernels", "eviction"}
PUBLIC_API = "public names of every room"

DOORS: dict[str, set[str] | str] = {
    "pages": set(),
    "assets": set(),
    "plan": {"pages", "eviction"},
    "codecs": {"pages"},
    "eviction": {"pages"},
    "kernels": {"pages", "codecs"},
    "cache": RUNTIME,
    "generation": RUNTIME | {"cache"},
    "signals": RUNTIME | {"cache"},
    "allocate": {"plan", "signals"},
    "evaluate": {"plan", "cache", "generation", "signals", "assets"},
    "bench": RUNTIME | {"cache", "evaluate", "generation"},
    "report": {"evaluate"},
    "testing": RUNTIME | {"cache", "signals"},
    "integrations": PUBLIC_API,
    "demo": PUBLIC_API,
    "sweep": PUBLIC_API,
    "cli": PUBLIC_API,
}


def imported(source: str, package: str) -> Iterator[str]:
    """Dotted names under kvloom that `source`, the text of a module of `package`, imports.

    A public name taken from the top package counts as one of the room it lives in.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=base, names=names, level=level):
                base = resolve_name("." * level + (base or ""), package)
                found = [f"{base}.{alias.name}" for alias in names]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found = [name]
            case _:
                continue
        for name in found:
            if name == "kvloom" or name.startswith("kvloom."):
                yield _home(name)


def _home(name: str) -> str:
    top, _, public = name.partition(".")
    return f"{kvloom._HOMES.get(public, top)}.{public}" if public not in rooms() else name


def violations(source: str, package: str) -> list[str]:
    """What `source` imports through a wall, one sentence each."""
    room = package.split(".")[1]
    doors = DOORS[room]
    found = []
    for name in imported(source, package):
        target, *rest = name.split(".")[1:]
        if target in SHARED | {room}:
            continue
        if doors != PUBLIC_API and target not in doors:
            found.append(f"{name}: {room} has no door to {target or 'the top package'}")
        elif any(part.startswith("_") for part in rest):
            found.append(f"{name} is private to {target}")
    return found


def rooms() -> list[str]:
    return sorted(folder.name for folder in ROOT.iterdir() if any(folder.glob("*.py")))


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_through_its_doors(room: str):
    assert room in DOORS, f"kvloom/{room} is not in the room table: give it a row"
    found = [
        f"{file.relative_to(ROOT)}: {sentence}"
        for file in sorted((ROOT / room).rglob("*.py"))
        for sentence in violations(file.read_text("utf-8"), _package(file))
    ]
    assert not found, "\n".join(found)


def _package(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).parent.parts)


def test_the_house_has_no_modules_outside_its_rooms():
    loose = {file.stem for file in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert loose == SHARED


def test_doors_make_no_circle():
    order: list[str] = []
    waiting = {room: set(doors) for room, doors in DOORS.items() if doors != PUBLIC_API}
    while waiting:
        free = [room for room, doors in waiting.items() if doors <= set(order)]
        assert free, f"a circle among {sorted(waiting)}"
        order += free
        waiting = {room: doors for room, doors in waiting.items() if room not in free}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kvloom.pages", "import kvloom.plan"),
        ("kvloom.pages", "import kvloom"),
        ("kvloom.pages", "from kvloom import Plan"),
        ("kvloom.pages", "from kvloom import plan"),
        ("kvloom.pages", "def f():\n    from kvloom.plan import Plan"),
        ("kvloom.pages", "if TYPE_CHECKING:\n    from kvloom.codecs import Codec"),
        ("kvloom.pages", "from ..codecs import Codec"),
        ("kvloom.pages", "from .. import codecs"),
        ("kvloom.codecs", "from kvloom.pages._pack import pack"),
        ("kvloom.codecs", "importlib.import_module('kvloom.cache')"),
        ("kvloom.assets", "from kvloom.plan import Plan"),
        ("kvloom.cli", "from kvloom.plan._plan import Plan"),
        ("kvloom.cli", "from kvloom.plan import _plan"),
    ],
)
def test_walls_hold(package: str, source: str):
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kvloom.pages", "import torch\nfrom kvloom.pages._pack import pack"),
        ("kvloom.pages", "from ._pack import pack\nfrom . import _pack"),
        ("kvloom.pages", "from kvloom._extras import require\nfrom kvloom.errors import PlanError"),
        ("kvloom.cache", "from kvloom.pages import PagedKV\nfrom kvloom import Plan"),
        ("kvloom.cli", "import kvloom\nfrom kvloom import Plan, __version__, allocate"),
    ],
)
def test_doors_open(package: str, source: str):
    assert violations(source, package) == []
