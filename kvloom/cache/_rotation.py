"""How one side of a layer's cache is turned, head by head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvloom import kernels
from kvloom.codecs import dual, dual_of, rotated, signs
from kvloom.pages import Rotation, SideLayout
from kvloom.plan import has_matrices


@dataclass(frozen=True)
class SideRotation(ABC):
    """A rotation of all KV heads, or of some.

    Attributes:
        dual: ``G`` of `kvloom.codecs.dual`, ``[head_dim, head_dim]``, or one for each KV head.
    """

    dual: torch.Tensor

    @property
    def output_turn(self) -> torch.Tensor:
        """``G^T``, by which what attention returns is turned, as queries are by ``G``."""
        return self.dual.transpose(-1, -2)

    @abstractmethod
    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """States ``[batch, kv_heads, tokens, head_dim]`` as they are cached."""

    @abstractmethod
    def appended(self, x: torch.Tensor) -> torch.Tensor:
        """States as `kvloom.kernels.append` takes them."""

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `cached`, up to rounding."""
        return kernels.turned(x, self.output_turn)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is resident for this layer alone, by name."""
        yield from ()

    def __deepcopy__(self, memo: dict[int, Any]) -> SideRotation:
        return self


@dataclass(frozen=True)
class HadamardRotation(SideRotation):
    """One transform of every head that is turned.

    Attributes:
        heads: KV heads that are turned; None for all.
    """

    heads: tuple[int, ...] | None

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """See `SideRotation.cached`."""
        if self.heads is None:
            return kernels.backend(x.device).rotate(x)
        return _with_heads(x, self.heads, kernels.backend(x.device).rotate(x[:, self.heads]))

    def appended(self, x: torch.Tensor) -> torch.Tensor:
        """See `SideRotation.appended`: layouts say what is to be turned."""
        return x


@dataclass(frozen=True)
class CalibratedRotation(SideRotation):
    """A matrix of each KV head.

    Attributes:
        forward: ``F``, float16 ``[kv_heads, head_dim, head_dim]``.
        hadamard: KV heads whose matrix is the Hadamard transform's.
    """

    forward: torch.Tensor
    hadamard: tuple[int, ...]

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """See `SideRotation.cached`.

        Sums are in float64: what a product of another shape adds up in another order does not show in the codes.
        """
        cached = self._by_matrices(x)
        if not self.hadamard:
            return cached
        return _with_heads(cached, self.hadamard, kernels.backend(x.device).rotate(x[:, self.hadamard]))

    def appended(self, x: torch.Tensor) -> torch.Tensor:
        """See `SideRotation.appended`: layouts say which other heads are to be turned."""
        return _with_heads(self._by_matrices(x), self.hadamard, x[:, self.hadamard])

    def _by_matrices(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.forward.double()).to(x.dtype)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `SideRotation.tensors`."""
        yield from (("forward", self.forward), ("dual", self.dual))


def side_rotation(
    sides: Sequence[SideLayout], matrices: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> SideRotation | None:
    """The rotation that one side of a layer asks for; None if no head is turned.

    Args:
        sides: Layout of each KV head.
        matrices: The plan's ``F`` for this side of this layer, float16 ``[kv_heads, head_dim, head_dim]``.
        dtype: Compute dtype.
        device: Of the cache.
    """
    names = [side.fmt.rotation for side in sides]
    heads = tuple(head for head, name in enumerate(names) if name)
    if not heads:
        return None
    if has_matrices(sides):
        assert matrices is not None
        return _calibrated(names, matrices, dtype, device)
    matrix = dual("hadamard", sides[0].head_dim, dtype, device)
    if len(heads) == len(names):
        return HadamardRotation(matrix, None)
    each = torch.eye(len(matrix), dtype=dtype, device=device).repeat(len(names), 1, 1)
    each[list(heads)] = matrix
    return HadamardRotation(each, heads)


def _calibrated(
    names: Sequence[Rotation | None], matrices: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> CalibratedRotation:
    """Calibrated heads by their matrices, the others by those of their own rotations."""
    forward, head_dim = matrices, matrices.shape[-1]
    if set(names) != {"calibrated"}:  # else a cache on the CPU holds the plan's own tensor, not a copy
        eye = torch.eye(head_dim, dtype=matrices.dtype)
        own = {None: eye, "hadamard": rotated(eye, signs("hadamard", head_dim))}
        forward = torch.stack([own.get(name, matrix) for name, matrix in zip(names, matrices, strict=True)])
    wide = torch.promote_types(dtype, torch.float32)
    hadamard = tuple(head for head, name in enumerate(names) if name == "hadamard")
    return CalibratedRotation(dual_of(forward).to(device, wide), forward.to(device), hadamard)


def _with_heads(x: torch.Tensor, heads: tuple[int, ...], others: torch.Tensor) -> torch.Tensor:
    """``x`` with ``others`` for these KV heads."""
    parts = list(x.unbind(1))
    for head, other in zip(heads, others.unbind(1), strict=True):
        parts[head] = other
    return torch.stack(parts, dim=1) if heads else x
