"""Optional packages: which extra brings which module, and one sentence when it is absent."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from kvloom.errors import MissingExtraError

EXTRAS: dict[str, tuple[str, ...]] = {
    "cli": ("typer", "rich"),
    "gguf": ("gguf", "accelerate"),
    "gpu": ("cuda.core", "triton"),
    "hqq": ("hqq",),
    "lm-eval": ("lm_eval",),
    "milp": ("scipy",),
    "plot": ("matplotlib",),
    "quanto": ("optimum.quanto", "ninja"),
    "ray": ("ray",),
    "search": ("optuna", "scipy"),
    "serve": ("httpx2",),
    "tasks": ("rouge_score", "wonderwords", "pyarrow"),
    "vllm": ("vllm",),
}
"""Extra of pyproject.toml -> the modules it brings."""


def missing(extra: str) -> tuple[str, ...]:
    """The modules of `extra` that cannot be found here; empty when the extra is installed."""
    return tuple(module for module in EXTRAS[extra] if not _found(module))


def pip_command(extra: str) -> str:
    """The command that installs `extra`."""
    return f"pip install 'kvloom[{extra}]'"


def require(extra: str, purpose: str) -> ModuleType:
    """Import and return the first module of `extra`.

    Args:
        extra: a key of `EXTRAS`.
        purpose: what needs it, as the subject of a sentence ("Reading GGUF files").

    Raises:
        MissingExtraError: a module of the extra is absent; the message has the pip command.
    """
    if absent := missing(extra):
        raise MissingExtraError(f"{purpose} needs {' and '.join(absent)}: run {pip_command(extra)}.")
    return importlib.import_module(EXTRAS[extra][0])


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is absent
        return False
