"""What a finished piece of work depends on besides its input: the model, the code, the machine."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from kvloom._ledger import Record
from kvloom._processes import local_tensor, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE = 64


def conditions(model: PreTrainedModel, code: tuple[str, ...]) -> Record:
    """What a finished piece of work must share with a later run to be used by it.

    Args:
        model: the model.
        code: rooms and files, relative to the package, whose code made the piece.
    """
    return {
        "model": _weights_hash(model),
        "device": device_name(model),
        "code": code_hash(code),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_name(model: PreTrainedModel) -> str:
    """The GPU's name, or the kind of device; with their number if processes share the model."""
    kind = model.device.type
    name = torch.cuda.get_device_name(model.device) if kind == "cuda" else kind
    return name if world_size(model) == 1 else f"{world_size(model)} x {name}"


def _weights_hash(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, shape, dtype and first elements; the same in all processes that share a model."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        here = local_tensor(weight.detach())
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(here.flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    if world_size(model) == 1:
        return digest.hexdigest()
    parts = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, digest.hexdigest())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@cache
def code_hash(code: tuple[str, ...]) -> str:
    """Hash of code, comments aside: pieces of another kvloom are not used.

    Args:
        code: rooms and files, relative to the package.
    """
    root = Path(__file__).parent
    files = [file for name in code for file in (sorted((root / name).rglob("*.py")) or [root / name])]
    digest = hashlib.sha256()
    for file in files:
        digest.update(ast.dump(ast.parse(file.read_bytes())).encode())
    return digest.hexdigest()


def own_code_hash(made_by: Iterable[object]) -> str | None:
    """Hash of the files, comments aside, that the classes of objects come from, bases included; kvloom's own count not.

    Args:
        made_by: signals, codecs or policies, which users can write.

    Returns:
        None if a class has no file (of a notebook, or typed in), so that nobody can tell whether it has changed.
    """
    known = {"kvloom", *sys.stdlib_module_names}
    names = {base.__module__ for each in made_by for base in type(each).__mro__}
    digest = hashlib.sha256()
    for name in sorted(names):
        if name.partition(".")[0] in known:
            continue
        try:
            source = inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):
            return None
        digest.update(ast.dump(ast.parse(source)).encode())
    return digest.hexdigest()
