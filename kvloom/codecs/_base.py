"""What a number format is to the rest of the house, and the registry that finds one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvloom._names import unknown
from kvloom.errors import PlanError
from kvloom.pages import CodecFacts, Format, declare_codec


@dataclass(frozen=True)
class Encoded:
    """A tensor as codes and parameters.

    Attributes:
        codes: uint8 ``[..., tokens, head_dim]``.
        params: One tensor for each of the format's ``num_params``, fp16 as `Codec.encode` gives them (fp32 as read from
            a page, which always gives two): ``[..., tokens / group_size, head_dim]`` for ``per_channel`` groups and
            ``[..., tokens, head_dim / group_size]`` for ``per_token``.
    """

    codes: torch.Tensor
    params: tuple[torch.Tensor, ...]


class Codec(ABC):
    """How values become codes and back. Stateless; one file a method.

    `kvloom.testing.check_codec` checks what is asked here. The codes of a group follow from its elements alone: a page
    gets the same bytes whether it is encoded alone or among others.

    Attributes:
        name: What plans call it.
        facts: Its form and the formats it takes.
    """

    name: str
    facts: CodecFacts = CodecFacts(form="opaque")

    @abstractmethod
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """Codes of ``x`` ``[..., tokens, head_dim]``, any floating dtype.

        ``tokens`` is whole groups, or a page where the codec has a group size of its own.

        Raises:
            CacheError: An element is NaN, infinite, or beyond fp16's range.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """Values in fp32 ``[..., tokens, head_dim]``."""

    @abstractmethod
    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        """The largest error that each element of ``x`` may be stored with: what the codec promises.

        Args:
            x: What `encode` takes.
            fmt: Format.

        Returns:
            Absolute errors, fp32 ``[..., tokens, head_dim]``.
        """

    def prepare(self) -> None:  # noqa: B027 (most codecs need nothing)
        """Make sure that `encode` can run here.

        Raises:
            MissingExtraError: It needs a package that is not installed.
        """


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype computations use: fp32, or fp64 for fp64 input."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_CODECS: dict[str, Codec] = {}


def register(codec: Codec) -> Codec:
    """Make a codec known by its name, to plans too."""
    _CODECS[codec.name] = codec
    declare_codec(codec.name, codec.facts)
    return codec


@contextmanager
def registered(codec: Codec) -> Iterator[None]:
    """Within the context plans may name ``codec``; afterwards its name means what it did before."""
    previous = _CODECS.get(codec.name)
    register(codec)
    try:
        yield
    finally:
        if previous is None:
            del _CODECS[codec.name]
            declare_codec(codec.name, None)
        else:
            register(previous)


def names() -> tuple[str, ...]:
    """Names of the registered codecs."""
    return tuple(_CODECS)


def get(name: str) -> Codec:
    """The codec called ``name``; raises PlanError naming the known ones."""
    if name not in _CODECS:
        raise PlanError(unknown("codec", name, sorted(_CODECS)))
    return _CODECS[name]
