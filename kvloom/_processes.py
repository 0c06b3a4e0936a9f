"""The processes that share a model which transformers has split by tensor parallelism; usually one."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor


def world_size(model: Any) -> int:
    """Processes that share a model (or config: 1)."""
    return getattr(model, "tp_size", None) or 1


def leads(model: Any) -> bool:
    """Whether this process writes files for all that share the model."""
    return world_size(model) == 1 or torch.distributed.get_rank() == 0


def local_tensor(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
