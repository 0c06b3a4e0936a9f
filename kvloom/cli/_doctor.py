"""`kvloom doctor`: what is here, what is missing, and the command that brings it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any

import typer

from kvloom import __version__
from kvloom._extras import EXTRAS, missing, pip_command

_PACKAGES = ("torch", "transformers", "pydantic", "safetensors", "numpy")

Facts = dict[str, Any]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices, kernels, extras and packaged assets."""
    facts = {
        "versions": {
            "kvloom": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "devices": _devices(),
        "extras": [_extra(name) for name in EXTRAS],
        "assets": _assets(),
    }
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _devices() -> list[Facts]:
    """Every device with its memory in bytes and the kernels that kvloom uses on it."""
    import torch

    from kvloom.kernels import backend

    found = [("cpu", platform.processor() or platform.machine(), _host_memory())]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append((f"cuda:{index}", card.name, card.total_memory))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU", torch.mps.recommended_max_memory()))
    return [
        {
            "device": device,
            "name": name,
            "memory_bytes": memory,
            "kernels": backend(torch.device(device)).name,
        }
        for device, name, memory in found
    ]


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not a POSIX system
        return None


def _extra(name: str) -> Facts:
    return {"extra": name, "missing": list(missing(name)), "install": pip_command(name)}


def _assets() -> Facts:
    from kvloom.assets import essays_dir, model_dir

    paths = {"model": model_dir(), "texts": essays_dir()}
    return {
        name: {"path": str(path), "present": path.is_dir(), "install": "kvloom fetch"} for name, path in paths.items()
    }


def _lines(facts: Facts) -> Iterator[str]:
    yield from (_line(name, number) for name, number in facts["versions"].items())
    yield ""
    for device in facts["devices"]:
        memory = device["memory_bytes"]
        size = f", {memory / 2**30:.1f} GiB" if memory else ""
        yield _line(device["device"], f"{device['name']}{size}, kernels: {device['kernels']}")
    yield ""
    for extra in facts["extras"]:
        absent = ", ".join(extra["missing"])
        state = f"missing {absent}: {extra['install']}" if absent else "installed"
        yield _line(f"[{extra['extra']}]", state)
    yield ""
    for name, asset in facts["assets"].items():
        state = asset["path"] if asset["present"] else f"missing: {asset['install']}"
        yield _line(f"packaged {name}", state)


def _line(label: str, text: str) -> str:
    return f"{label:<16}{text}"
