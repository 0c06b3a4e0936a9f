"""What is measured: shapes, pairs of bits, heads, dtype; read from the words of a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from kvloom._dtypes import torch_dtype
from kvloom._sizes import TOKENS, parse_tokens
from kvloom.errors import PlanError
from kvloom.pages import BITS, Format, PageLayout, page_layout

_DEFAULTS = {
    "cuda": ("B8x32K,B1x128K,B1x32K,B1x4K,B1x1K", "8:8,4:4,4:2,3:3,2:2,1:1", "float16"),
    "cpu": ("B1x2K,B1x512", "4:4,2:2", "float32"),
}
_SHAPE = re.compile(r"B(\d+)x(.+)")
_PAIR = re.compile(r"(\d+):(\d+)")
_HEADS = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Shape:
    """Sequences, and packed tokens of each."""

    batch: int
    tokens: int

    @property
    def label(self) -> str:
        """As on the command line: ``B8x32K``."""
        unit = next(unit for unit in ("M", "K", "") if self.tokens % TOKENS[unit] == 0)
        return f"B{self.batch}x{self.tokens // TOKENS[unit]}{unit}"


@dataclass(frozen=True)
class Pair:
    """Bits of keys and of values."""

    key_bits: int
    value_bits: int

    @property
    def label(self) -> str:
        """As in tables: ``K4V2``."""
        return f"K{self.key_bits}V{self.value_bits}"


@dataclass(frozen=True)
class Grid:
    """Every shape is measured with every pair.

    Attributes:
        shapes: Sequences and packed tokens; tokens are whole pages.
        pairs: Bits of keys and values.
        query_heads: Query heads, a multiple of ``kv_heads``.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        key_group: Tokens that share a scale of a key channel; values have one scale a token and head.
        window: Exact tokens after the packed ones.
        dtype: Compute dtype of queries, exact tokens and the dense caches beside.

    Raises:
        PlanError: A number does not fit the others; the message names the option.
    """

    shapes: tuple[Shape, ...]
    pairs: tuple[Pair, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    key_group: int
    window: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not (self.kv_heads > 0 and self.query_heads > 0 and self.query_heads % self.kv_heads == 0):
            raise PlanError(
                f"--heads {self.query_heads}/{self.kv_heads}: query heads must be a multiple of KV heads, as in 32/8."
            )
        if self.window < 0:
            raise PlanError(f"--window {self.window}: give the number of exact tokens, 0 or more.")
        for pair in self.pairs:
            self._check(pair)

    def layout(self, pair: Pair) -> PageLayout:
        """Page layout of a pair: keys per channel, values with one scale a token."""
        key = Format(pair.key_bits, "per_channel", self.key_group)
        return page_layout(key, Format(pair.value_bits, "per_token", self.head_dim), self.head_dim, self.itemsize)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the compute dtype."""
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """``float16``, ..."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def scaling(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5)

    def _check(self, pair: Pair) -> None:
        try:
            layout = self.layout(pair)
        except PlanError as error:
            raise PlanError(f"--head-dim {self.head_dim}, --key-group {self.key_group}: {error}") from None
        for shape in self.shapes:
            if shape.batch < 1 or shape.tokens < 1 or shape.tokens % layout.page_tokens:
                raise PlanError(
                    f"--shapes {shape.label}: give a batch above 0, and tokens in whole pages of {layout.page_tokens}."
                )


def make_grid(
    device: torch.device,
    *,
    shapes: str | None = None,
    pairs: str | None = None,
    heads: str = "32/8",
    head_dim: int = 128,
    key_group: int = 64,
    window: int = 32,
    dtype: str | None = None,
) -> Grid:
    """Read a grid from words.

    Args:
        device: What it is for; a CPU has fewer and smaller shapes by default, and computes in fp32.
        shapes: ``B8x32K,B1x4K``: batch and packed tokens, K = 1024.
        pairs: ``4:4,4:2``: bits of keys and of values.
        heads: ``32/8``: query heads and KV heads.
        head_dim: Channels of a head.
        key_group: Tokens of a group of keys.
        window: Exact tokens after the packed ones.
        dtype: ``float16``, ``bfloat16`` or ``float32``, or another word for it.

    Raises:
        PlanError: A word cannot be read, or does not fit the others; the message names the option.
    """
    default_shapes, default_pairs, default_dtype = _DEFAULTS[device.type]
    query_heads, kv_heads = _numbers("--heads", _HEADS, heads, "32/8")
    return Grid(
        shapes=tuple(_shape(word) for word in words(shapes or default_shapes)),
        pairs=tuple(_pair(word) for word in words(pairs or default_pairs)),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        key_group=key_group,
        window=window,
        dtype=torch_dtype(dtype or default_dtype),
    )


def words(text: str) -> list[str]:
    """The words of a comma-separated list, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _shape(word: str) -> Shape:
    match = _SHAPE.fullmatch(word)
    if match is None:
        raise PlanError(f"--shapes: cannot read {word!r}; give batch and tokens as in B8x32K.")
    return Shape(int(match[1]), tokens_of(word, match[2]))


def tokens_of(word: str, length: str) -> int:
    """The tokens of a word of ``--shapes``.

    Raises:
        PlanError: They cannot be read.
    """
    try:
        return parse_tokens(length)
    except PlanError as error:
        raise PlanError(f"--shapes {word}: {error}") from None


def _pair(word: str) -> Pair:
    pair = Pair(*_numbers("--pairs", _PAIR, word, "4:2"))
    for bits in (pair.key_bits, pair.value_bits):
        if bits not in BITS:
            raise PlanError(f"--pairs {word}: {bits} bits is not one of {', '.join(map(str, BITS))}.")
    return pair


def _numbers(option: str, pattern: re.Pattern[str], word: str, example: str) -> tuple[int, int]:
    match = pattern.fullmatch(word)
    if match is None:
        raise PlanError(f"{option}: cannot read {word!r}; give two numbers as in {example}.")
    return int(match[1]), int(match[2])
