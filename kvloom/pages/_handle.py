"""`PagedKV` and `StaticKV`: what a packed layer hands to attention in place of key and value tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, NoReturn

import torch

from kvloom.errors import ModelError
from kvloom.pages._format import Format
from kvloom.pages._layout import PageLayout, page_layout


@dataclass(frozen=True)
class KeptRecords:
    """Where the pages lie that hold kept tokens, of which every head may have another number.

    Attributes:
        extents: int32 ``[batch, heads, 2]``: the first record of a head, and how many pages of kept tokens it has. They
            come before the pages that `PagedKV.num_pages` counts, whose records follow.
        places: ``[batch or 1, heads or 1, records, page_tokens]``, the place of each token in its sequence, see
            `stored`.
    """

    extents: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class HeadPages:
    """Page records of the KV heads that share a layout.

    Attributes:
        heads: Indices of those heads, rising.
        layout: Their layout.
        data: uint8 ``[batch, len(heads), pages, layout.nbytes]``; with ``kept`` ``[batch or 1, len(heads) or 1,
            records, layout.nbytes]``, where one entry is shared by all.
        kept: Which of the records a head has; None if page ``i`` is record ``i``.
    """

    heads: tuple[int, ...]
    layout: PageLayout
    data: torch.Tensor
    kept: KeptRecords | None = None

    def mean_pages(self, batch: int) -> int:
        """Pages of a head there is room for, the mean where they are kept, rounded up."""
        if self.kept is None:
            return self.data.shape[2]
        return -(-self.data.shape[:3].numel() // (batch * len(self.heads)))


@dataclass(frozen=True)
class ExactKV:
    """Tokens kept in the compute dtype: ``[batch, kv_heads, tokens, head_dim]`` each."""

    key: torch.Tensor
    value: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.key.shape[-2]


class _Handle:
    """Stands for keys and values, and refuses to be used as a tensor: some models do arithmetic on what they get."""

    tail: ExactKV

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.tail.key.dtype

    @property
    def device(self) -> torch.device:
        """Device of the cache."""
        return self.tail.key.device

    def __getattr__(self, name: str) -> NoReturn:
        if hasattr(torch.Tensor, name) and not name.startswith("_"):
            raise _used_as_tensor(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _used_as_tensor(getattr(func, "__name__", func))


def _used_as_tensor(name: object) -> ModelError:
    return ModelError(
        f"the model applies {name} to its cached keys or values, which are packed: call kvloom.disable(model) and use "
        "the cache without enable."
    )


@dataclass(frozen=True)
class PagedKV(_Handle):
    """One layer's cache at one forward pass: sinks, pages and the exact tail, as one sequence of slots.

    Slots ``[0, sinks)`` are the sinks, pages follow in order, the tail ends at ``length``. Pages and tail may overlap
    (prefill "quantized"): query ``i`` reads pages ``[0, visible[i])`` packed and every later slot from the tail.

    Where other tokens were evicted, pages of kept ones (`HeadPages.kept`) come before all that and have no slots.

    Attributes:
        pages: Page records, by layout.
        sinks: First tokens.
        tail: Newest tokens, this pass's own included.
        length: Tokens seen, this pass's own included.
        page_tokens: Tokens in a page.
        num_pages: Pages held.
        visible: int64 ``[queries]``, pages each query of this pass reads.
        query_turn: Matrix that queries are to be multiplied with, ``[head_dim, head_dim]`` or one for each KV head;
            None for none. Backends do not look at it.
        output_turn: Likewise for outputs.
        places: ``[batch, kv_heads, length]``, the place of each slot's token in its sequence, see `stored`; None if
            slots are places.
        table: int32 ``[batch, num_pages]``, which record holds a page of a sequence; ``data`` of pages is then ``[1,
            heads, records, layout.nbytes]``, shared by the sequences. None if page ``i`` is record ``i``.
        own: The states of this pass as the model made them, where it reads nothing else; None where it does. Attention
            over them needs no turns. Backends do not look at it.
    """

    pages: tuple[HeadPages, ...]
    sinks: ExactKV
    tail: ExactKV
    length: int
    page_tokens: int
    num_pages: int
    visible: torch.Tensor
    query_turn: torch.Tensor | None = None
    output_turn: torch.Tensor | None = None
    places: torch.Tensor | None = None
    table: torch.Tensor | None = None
    own: ExactKV | None = None

    @property
    def has_pages(self) -> bool:
        """Whether any sequence may hold a page."""
        return self.num_pages > 0 or any(g.kept is not None and g.data.numel() > 0 for g in self.pages)

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor it stands for, ``[batch, kv_heads, tokens, head_dim]``, kept pages left out."""
        batch, heads, _, dim = self.tail.key.shape
        return torch.Size((batch, heads, self.length, dim))

    def exact_slots(self) -> torch.Tensor:
        """int64 slots of the sinks, then of the tail."""
        first = torch.arange(self.sinks.tokens, device=self.device)
        return torch.cat([first, torch.arange(self.length - self.tail.tokens, self.length, device=self.device)])

    def page_slots(self) -> torch.Tensor:
        """int64 slots of the packed tokens, page after page."""
        start = self.sinks.tokens
        return torch.arange(start, start + self.num_pages * self.page_tokens, device=self.device)

    def in_order(self) -> PagedKV:
        """The same without a `table`: records are copied."""
        if self.table is None:
            return self
        pages = tuple(replace(group, data=records_of(group.data, self.table)) for group in self.pages)
        return replace(self, pages=pages, table=None)


def records_of(data: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A copy of the records that a table names, in order.

    Args:
        data: uint8 ``[1, heads, records, layout.nbytes]``.
        table: int32 ``[batch, pages]``, numbers of records.

    Returns:
        uint8 ``[batch, heads, pages, layout.nbytes]``.
    """
    return data[0][:, table.long()].transpose(0, 1)


@dataclass(frozen=True)
class StaticKV(_Handle):
    """One layer's cache of fixed size, whose fill level stands on the device: the same tensors at every step.

    Attributes:
        pages: Page records, by layout; ``data`` holds ``num_pages`` of them. With a ``table`` it is
            ``[1, heads, pool pages, layout.nbytes]``, shared by the sequences.
        sinks: First tokens.
        tail: A ring of exact tokens: the token of slot ``s`` lies at ``(s - sinks) % tail.tokens``. Whole pages long.
        state: int32: (tokens, pages that the newest token reads) of each sequence, then counters that are zero between
            launches, one at least.
        flags: int32 ``[2]``, which layers may share: whether something out of range was packed; whether a token was
            lost because the cache was full. Set and never cleared.
        filled: int32 ``[length + 1]``, pages that are full by number of tokens.
        page_tokens: Tokens in a page.
        table: int32 ``[batch, num_pages]``, which record of the pool holds a page of a sequence; None if in order.
        query_turn: See `PagedKV`; `kvloom.kernels.Backend.attend_static` turns by it.
        output_turn: Likewise.
        places: See `PagedKV`; ``[batch, kv_heads, length]``, of tokens to come, too.
        layouts: Heads and layouts of ``pages`` as text, see `layouts_of`.
    """

    pages: tuple[HeadPages, ...]
    sinks: ExactKV
    tail: ExactKV
    state: torch.Tensor
    flags: torch.Tensor
    filled: torch.Tensor
    page_tokens: int
    table: torch.Tensor | None = None
    query_turn: torch.Tensor | None = None
    output_turn: torch.Tensor | None = None
    places: torch.Tensor | None = None
    layouts: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layouts", _text_of(tuple((g.heads, g.layout) for g in self.pages)))

    @property
    def length(self) -> int:
        """Most tokens of a sequence."""
        return self.filled.shape[0] - 1

    @property
    def num_pages(self) -> int:
        """Most pages of a sequence; the mean of its heads where pages are kept."""
        return self.pages[0].mean_pages(self.tail.key.shape[0]) if self.table is None else self.table.shape[1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor it stands for when full, ``[batch, kv_heads, tokens, head_dim]``."""
        batch, heads, _, dim = self.tail.key.shape
        return torch.Size((batch, heads, self.length, dim))

    def levels(self) -> torch.Tensor:
        """int32 ``[batch, 2]``: tokens, and pages that the newest token reads; a view of `state`."""
        return self.state[: 2 * self.tail.key.shape[0]].view(-1, 2)

    def counters(self) -> torch.Tensor:
        """int32, zero between launches; a view of `state`."""
        return self.state[2 * self.tail.key.shape[0] :]

    def ring_slots(self, start: int, stop: int) -> torch.Tensor:
        """int64 places in the ring of slots ``[start, stop)``, counted after the sinks."""
        return torch.arange(start, stop, device=self.device) % self.tail.tokens

    def paged(self, rows: slice, tokens: int, pages: int) -> PagedKV:
        """The same cache as a `PagedKV`, for the sequences ``rows``, which hold ``tokens`` and read ``pages`` each."""
        sinks = min(tokens, self.sinks.tokens)
        start = pages * self.page_tokens
        slots = self.ring_slots(start, tokens - sinks)
        table = None if self.table is None else self.table[rows, :pages]
        return PagedKV(
            tuple(HeadPages(g.heads, g.layout, self._data(g, rows, pages), _of_rows(g.kept, rows)) for g in self.pages),
            ExactKV(self.sinks.key[rows, :, :sinks], self.sinks.value[rows, :, :sinks]),
            ExactKV(self.tail.key[rows][:, :, slots], self.tail.value[rows][:, :, slots]),
            tokens,
            self.page_tokens,
            pages,
            torch.full((1,), pages, device=self.device),
            places=None if self.places is None else self.places[rows, :, :tokens],
            table=table,
        )

    def _data(self, group: HeadPages, rows: slice, pages: int) -> torch.Tensor:
        return group.data if self.table is not None else self.records(group, rows, pages)

    def records(self, group: HeadPages, rows: slice, pages: int) -> torch.Tensor:
        """First ``pages`` records of sequences, ``[batch, heads, pages, layout.nbytes]``; a copy with a table.

        All records where pages are kept.
        """
        if group.kept is not None:
            return group.data[rows]
        if self.table is None:
            return group.data[rows, :, :pages]
        return records_of(group.data, self.table[rows, :pages])

    def store(self, group: HeadPages, rows: slice, page: int, records: torch.Tensor) -> None:
        """Write records ``[batch, heads, pages, layout.nbytes]`` of sequences as their pages from ``page`` on."""
        stop = page + records.shape[2]
        if group.kept is not None:
            after = group.kept.extents[rows].long().sum(-1)[..., None]  # of the kept pages of each head
            row = torch.arange(len(after), device=after.device)[:, None, None]
            group.data[rows][row, 0, after + torch.arange(page, stop, device=after.device)] = records
        elif self.table is None:
            group.data[rows, :, page:stop] = records
        else:
            group.data[0][:, self.table[rows, page:stop].long()] = records.transpose(0, 1)


def state_numbers(batch: int, kv_heads: int) -> int:
    """Numbers of `StaticKV.state`: levels of every sequence, then counters."""
    return 2 * batch + 1 + _COUNTERS_A_HEAD * batch * kv_heads


# A ticket for appending, and one for each tile of 8 query rows of a KV head: enough for 32 query heads a KV head.
_COUNTERS_A_HEAD = 4


def _of_rows(kept: KeptRecords | None, rows: slice) -> KeptRecords | None:
    return None if kept is None else KeptRecords(kept.extents[rows], kept.places[rows])


@lru_cache(maxsize=1024)
def _text_of(groups: tuple[tuple[tuple[int, ...], PageLayout], ...]) -> str:
    return json.dumps([(heads, asdict(layout.key.fmt), asdict(layout.value.fmt)) for heads, layout in groups])


@lru_cache(maxsize=1024)
def layouts_of(
    text: str, head_dim: int, itemsize: int, page_tokens: int
) -> tuple[tuple[tuple[int, ...], PageLayout], ...]:
    """Heads and layouts that `StaticKV.layouts` names; the other numbers are those of its tensors."""
    return tuple(
        (tuple(heads), page_layout(_format(key), _format(value), head_dim, itemsize, page_tokens))
        for heads, key, value in json.loads(text)
    )


def _format(fields: dict[str, Any]) -> Format:
    codebook = fields["codebook"]
    return Format(**{**fields, "codebook": None if codebook is None else tuple(codebook)})
