"""What a number format is to the rest of the house, and the registry that finds one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvloom.errors import PlanError
from kvloom.pages import Format


@dataclass(frozen=True)
class Encoded:
    """A tensor as codes and parameters.

    Attributes:
        codes: uint8 ``[..., tokens, head_dim]``.
        params: fp16 tensors, each ``[..., tokens / group_size, head_dim]`` for ``per_channel`` groups and
            ``[..., tokens, head_dim / group_size]`` for ``per_token``.
    """

    codes: torch.Tensor
    params: tuple[torch.Tensor, ...]


class Codec(ABC):
    """How values become codes and back. Stateless; one file a method."""

    name: str

    @abstractmethod
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """Codes of ``x`` ``[..., tokens, head_dim]``, any floating dtype; ``tokens`` is whole groups."""

    @abstractmethod
    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """Values in fp32 ``[..., tokens, head_dim]``."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype computations use: fp32, or fp64 for fp64 input."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_CODECS: dict[str, Codec] = {}


def register(codec: Codec) -> Codec:
    """Make a codec known by its name."""
    _CODECS[codec.name] = codec
    return codec


def get(name: str) -> Codec:
    """The codec called ``name``; raises PlanError naming the known ones."""
    if name not in _CODECS:
        raise PlanError(f"codec {name!r} is unknown; choose one of {sorted(_CODECS)}.")
    return _CODECS[name]
