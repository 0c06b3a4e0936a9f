"""What results depend on besides the contestant: the model, the code, the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvloom._conditions import conditions as shared_conditions
from kvloom._conditions import device_name
from kvloom._ledger import Record
from kvloom.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Progress = Callable[[str, int, int], None]
"""`(what, done, total)`, called before each piece of work and once at the end."""

_CODE = (
    *("cache", "codecs", "eviction", "generation", "kernels", "pages", "plan"),
    *("evaluate/_continuation.py", "evaluate/_live.py", "evaluate/_peers.py", "evaluate/_reply.py"),
    *("evaluate/_scores.py", "evaluate/_steps.py", "evaluate/_through.py"),
)
"""The code that a score goes through."""


def silent(what: str, done: int, total: int) -> None:
    """Progress nobody watches."""


def model_name(model: PreTrainedModel) -> str:
    """The last part of the model's name or folder."""
    return Path(str(model.config.name_or_path)).name or type(model).__name__


def reads_at_most(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """Tokens that a model reads, as its configuration says; None if it does not."""
    config: Any = getattr(model, "config", model)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def surroundings(model: PreTrainedModel, name: str | None) -> Record:
    """The fields that say on what a record was measured."""
    return {
        "model": name or model_name(model),
        "device": device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def conditions(model: PreTrainedModel) -> Record:
    """What a finished piece of work must share with a later run to be used by it."""
    return shared_conditions(model, _CODE)


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
