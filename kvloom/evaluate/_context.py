"""What results depend on besides the contestant: the model, the code, the machine."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kvloom.errors import DataError, ModelError
from kvloom.evaluate._ledger import Record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""`(what, done, total)`, called before each piece of work and once at the end."""

_CODE = ("cache", "codecs", "kernels", "pages", "plan")
_OWN_CODE = ("_continuation.py", "_live.py", "_peers.py", "_reply.py", "_scores.py", "_through.py")
_SAMPLE = 64


def silent(what: str, done: int, total: int) -> None:
    """Progress nobody watches."""


def model_name(model: PreTrainedModel) -> str:
    """The last part of the model's name or folder."""
    return Path(str(model.config.name_or_path)).name or type(model).__name__


def reads_at_most(model: PreTrainedModel) -> int | None:
    """Tokens that a model reads, as its configuration says; None if it does not."""
    config: Any = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def surroundings(model: PreTrainedModel, name: str | None) -> Record:
    """The fields that say on what a record was measured."""
    return {
        "model": name or model_name(model),
        "device": _device(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def conditions(model: PreTrainedModel) -> Record:
    """What a finished piece of work must share with a later run to be used by it."""
    return {
        "model": _weights_hash(model),
        "device": _device(model),
        "code": _code_hash(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def tokens_hash(tokens: Tensor) -> str:
    """Sha256 (hex) of token ids and their shape."""
    data = tokens.cpu().to(torch.int64).contiguous()
    return hashlib.sha256(f"{tuple(data.shape)}".encode() + data.numpy().tobytes()).hexdigest()


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose dropout is on.

    Raises:
        ModelError: the model is in training mode.
    """
    if model.training:
        raise ModelError("The model is in training mode, which is random: call model.eval() first.")


def check_logits(logits: Tensor, who: str) -> Tensor:
    """Pass logits through if they are numbers.

    Raises:
        DataError: some are NaN or infinite.
    """
    if not torch.isfinite(logits).all():
        raise DataError(
            f"The logits of {who} are not finite: try float32, and check that the model's weights are whole."
        )
    return logits


def _device(model: PreTrainedModel) -> str:
    kind = model.device.type
    return torch.cuda.get_device_name(model.device) if kind == "cuda" else kind


def _weights_hash(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, shape, dtype and first elements."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@cache
def _code_hash() -> str:
    """Hash of the code that a score goes through, comments aside: pieces of another kvloom are not used."""
    root = Path(__file__).parents[1]
    files = [file for room in _CODE for file in sorted((root / room).rglob("*.py"))]
    files += [root / "evaluate" / name for name in _OWN_CODE]
    digest = hashlib.sha256()
    for file in files:
        digest.update(ast.dump(ast.parse(file.read_bytes())).encode())
    return digest.hexdigest()
