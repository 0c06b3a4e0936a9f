"""Tensors to compare quantisers on, and how."""

from __future__ import annotations

import torch

from kvloom import codecs
from kvloom.codecs._groups import group, ungroup
from kvloom.pages import Format


def normal() -> torch.Tensor:
    return torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0))


def keys() -> torch.Tensor:
    """Channels of very different sizes, far from zero."""
    spread = torch.logspace(-1, 1, 64)
    return normal() * spread + 2 * spread.flip(0)


def heavy() -> torch.Tensor:
    """A few elements far out (normal over the root of a chi-squared with 4 degrees of freedom)."""
    g = torch.Generator().manual_seed(1)
    return normal() / torch.randn(4, 1, 2, 128, 64, generator=g).square().mean(0).sqrt()


SAMPLES = {"normal": normal, "keys": keys, "heavy": heavy}
GROUPINGS = [("per_channel", 64), ("per_token", 32)]


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).double().norm() / y.double().norm())


def decoded(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    codec = codecs.get(fmt.codec)
    return codec.decode(codec.encode(x, fmt), fmt)


def rows(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Groups as the rows of a matrix."""
    return group(x, fmt).reshape(-1, fmt.group_size)


def from_rows(matrix: torch.Tensor, like: torch.Tensor, fmt: Format) -> torch.Tensor:
    return ungroup(matrix.reshape(group(like, fmt).shape), like.shape, fmt).float()
