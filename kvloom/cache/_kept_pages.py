"""Pages of which every sequence and KV head may hold a different number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from kvloom.cache._index import named, numbers
from kvloom.cache._slots import slot_dtype
from kvloom.pages import HeadPages, KeptRecords, PageLayout, places, stored


@dataclass(frozen=True)
class KeptPages:
    """Page records of the KV heads that share a layout: sequence by sequence, head by head, in order of position.

    Attributes:
        heads: Indices of those heads, rising.
        layout: Their layout.
        data: uint8 ``[records, layout.nbytes]``.
        slots: ``[records, page_tokens]``, the place of each token in its sequence, see `stored`.
        mass: fp64 ``[records]``, attention that the tokens of a page have received so far; None if nobody asks.
        counts: int32 ``[batch, len(heads)]`` on the CPU: records of each.
    """

    heads: tuple[int, ...]
    layout: PageLayout
    data: torch.Tensor
    slots: torch.Tensor
    mass: torch.Tensor | None
    counts: torch.Tensor

    @classmethod
    def empty(cls, group: HeadPages, *, has_mass: bool) -> KeptPages:
        """No pages, for the heads and the batch of ``group``."""
        data = group.data.new_empty((0, group.layout.nbytes))
        slots = data.new_empty((0, group.layout.page_tokens), dtype=slot_dtype(0))
        mass = data.new_empty(0, dtype=torch.float64) if has_mass else None
        return cls(group.heads, group.layout, data, slots, mass, torch.zeros(group.data.shape[:2], dtype=torch.int32))

    def emptied(self) -> KeptPages:
        """No pages, for the same heads and batch."""
        mass = None if self.mass is None else self.mass.new_empty(0)
        data, slots = (x.new_empty((0, x.shape[1])) for x in (self.data, self.slots))
        return replace(self, data=data, slots=slots, mass=mass, counts=torch.zeros_like(self.counts))

    @cached_property
    def sizes(self) -> list[int]:
        """`counts`, sequence by sequence, head by head."""
        sizes: list[int] = self.counts.flatten().tolist()
        return sizes

    @property
    def most(self) -> int:
        """Pages of the head that holds the most."""
        return max(self.sizes, default=0)

    def holds(self, pages: int) -> bool:
        """Whether every head holds so many."""
        return all(size == pages for size in self.sizes)

    def shared(self) -> HeadPages:
        """As attention reads them: every head its own of the records."""
        extents = [number for pair in zip(self._first(), self.sizes, strict=True) for number in pair]
        at = numbers(extents, self.data.device, torch.int32).view(*self.counts.shape, 2)
        data, slots = (x.expand(1, 1, *x.shape) for x in (self.data, self.slots))
        return HeadPages(self.heads, self.layout, data, KeptRecords(at, slots))

    def padded(self, most: int) -> HeadPages:
        """As if every head held ``most`` pages, the first record in place of those that it lacks.

        A view where every head holds as many, else a copy.
        """
        return HeadPages(self.heads, self.layout, self._padded(self.data, most))

    def padded_slots(self, most: int) -> torch.Tensor:
        """int64 ``[batch, heads, most, page_tokens]``; -1 in pages that a head lacks."""
        return self._filled(places(self.slots), most, -1)

    def padded_mass(self, most: int) -> torch.Tensor:
        """fp64 ``[batch, heads, most]``; 0 for pages that a head lacks."""
        assert self.mass is not None
        return self._filled(self.mass, most, 0)

    def _padded(self, x: torch.Tensor, most: int) -> torch.Tensor:
        if self.holds(most):
            return x.view(*self.counts.shape, most, *x.shape[1:])
        if not len(x):
            return x.new_zeros(*self.counts.shape, most, *x.shape[1:])
        return x[self._on_device(self._index(most).clamp_min(0))]

    def _filled(self, x: torch.Tensor, most: int, value: int) -> torch.Tensor:
        padded = self._padded(x, most)
        if self.holds(most):
            return padded
        lacks = (self._index(most) < 0).view(*padded.shape[:3], *[1] * (padded.dim() - 3))
        return padded.masked_fill(self._on_device(lacks), value)

    def _index(self, most: int) -> torch.Tensor:
        """int64 ``[batch, heads, most]`` of records, on the CPU; -1 for pages that a head lacks."""
        pages, first = torch.arange(most), torch.tensor(self._first()).view(self.counts.shape)
        return torch.where(pages < self.counts[..., None], first[..., None] + pages, -1)

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.data.device, non_blocking=True)

    def _first(self) -> list[int]:
        """First record of each, in the order of `sizes`."""
        return [stop - size for stop, size in zip(accumulate(self.sizes), self.sizes, strict=True)]

    def owners(self) -> torch.Tensor:
        """int64 ``[records]``: ``sequence * heads + head`` of each, on the CPU."""
        return torch.arange(self.counts.numel()).repeat_interleave(self.counts.flatten().long())

    def with_mass(self, new: torch.Tensor) -> KeptPages:
        """With ``new`` ``[batch, heads, pages]`` added to the attention that pages have received."""
        assert self.mass is not None
        own = new.flatten()
        if not self.holds(new.shape[-1]):
            own = own[self._on_device((self._index(new.shape[-1]).flatten() >= 0).nonzero()[:, 0])]
        return replace(self, mass=self.mass + own)

    def with_slots(self, dtype: torch.dtype) -> KeptPages:
        """With places stored in a dtype."""
        return replace(self, slots=stored(places(self.slots), dtype))

    def joined(self, other: KeptPages) -> KeptPages:
        """These pages, and after those of each head its pages of ``other``."""
        if not len(self.data):
            return other
        order = self._on_device(torch.cat([self.owners(), other.owners()]).argsort(stable=True))
        mass = None if self.mass is None or other.mass is None else torch.cat([self.mass, other.mass])[order]
        data, slots = (torch.cat(pair)[order] for pair in ((self.data, other.data), (self.slots, other.slots)))
        return replace(self, data=data, slots=slots, mass=mass, counts=self.counts + other.counts)

    def only(self, stays: torch.Tensor, sizes: Sequence[int]) -> KeptPages:
        """The pages that stay.

        Args:
            stays: bool ``[batch, heads, pages]``, false where a head lacks the last ones.
            sizes: How many stay, in the order of `sizes`.
        """
        most = stays.shape[-1]
        index = named(stays, sum(sizes))
        if not self.holds(most):
            index = self._on_device(self._index(most).flatten())[index]
        return self._taken(index, torch.tensor(sizes, dtype=torch.int32).view(self.counts.shape))

    def of_sequences(self, rows: torch.Tensor) -> KeptPages:
        """Those of the sequences ``rows``, int64 on the device to be on."""
        chosen = rows.cpu()
        index = self._index(self.most)[chosen]
        return self._taken(self._on_device(index[index >= 0]), self.counts[chosen]).to(rows.device)

    def _taken(self, index: torch.Tensor, counts: torch.Tensor) -> KeptPages:
        mass = None if self.mass is None else self.mass[index]
        return replace(self, data=self.data[index], slots=self.slots[index], mass=mass, counts=counts)

    def to(self, device: torch.device) -> KeptPages:
        """The same pages on a device."""
        mass = None if self.mass is None else self.mass.to(device)
        return replace(self, data=self.data.to(device), slots=self.slots.to(device), mass=mass)
