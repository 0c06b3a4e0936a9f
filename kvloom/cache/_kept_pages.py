"""Pages of which every sequence and KV head may hold a different number."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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
        data = group.data.flatten(0, 2)[:0].clone()
        slots = torch.zeros((0, group.layout.page_tokens), dtype=slot_dtype(0), device=data.device)
        mass = torch.zeros(0, dtype=torch.float64, device=data.device) if has_mass else None
        return cls(group.heads, group.layout, data, slots, mass, torch.zeros(group.data.shape[:2], dtype=torch.int32))

    def shared(self) -> HeadPages:
        """As attention reads them: every head its own of the records."""
        extents = torch.stack([self._first(), self.counts], dim=-1).int().to(self.data.device)
        return HeadPages(self.heads, self.layout, self.data[None, None], KeptRecords(extents, self.slots[None, None]))

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
        if bool((self.counts == most).all()):
            return x.view(*self.counts.shape, most, *x.shape[1:])
        if not len(x):
            return x.new_zeros(*self.counts.shape, most, *x.shape[1:])
        return x[self._index(most).clamp_min(0)]

    def _filled(self, x: torch.Tensor, most: int, value: int) -> torch.Tensor:
        padded = self._padded(x, most)
        lacks = (self._index(most) < 0).view(*padded.shape[:3], *[1] * (padded.dim() - 3))
        return padded.masked_fill(lacks, value)

    def _index(self, most: int) -> torch.Tensor:
        """int64 ``[batch, heads, most]`` of records; -1 for pages that a head lacks."""
        pages = torch.arange(most)
        index = torch.where(pages < self.counts[..., None], self._first()[..., None] + pages, -1)
        return index.to(self.data.device)

    def _first(self) -> torch.Tensor:
        """int64 ``[batch, heads]``: first record of each."""
        counts = self.counts.long()
        return counts.flatten().cumsum(0).view_as(counts) - counts

    def owners(self) -> torch.Tensor:
        """int64 ``[records]``: ``sequence * heads + head`` of each, on the CPU."""
        return torch.arange(self.counts.numel()).repeat_interleave(self.counts.flatten().long())

    def with_mass(self, new: torch.Tensor) -> KeptPages:
        """With ``new`` ``[batch, heads, pages]`` added to the attention that pages have received."""
        assert self.mass is not None
        return replace(self, mass=self.mass + new[self._index(new.shape[-1]) >= 0])

    def with_slots(self, dtype: torch.dtype) -> KeptPages:
        """With places stored in a dtype."""
        return replace(self, slots=stored(places(self.slots), dtype))

    def joined(self, other: KeptPages) -> KeptPages:
        """These pages, and after those of each head its pages of ``other``."""
        order = torch.cat([self.owners(), other.owners()]).argsort(stable=True).to(self.data.device)
        mass = None if self.mass is None or other.mass is None else torch.cat([self.mass, other.mass])[order]
        data, slots = (torch.cat(pair)[order] for pair in ((self.data, other.data), (self.slots, other.slots)))
        return replace(self, data=data, slots=slots, mass=mass, counts=self.counts + other.counts)

    def only(self, stays: torch.Tensor) -> KeptPages:
        """The pages that stay, by bool ``[batch, heads, pages]``, where a head may lack the last ones."""
        index = self._index(stays.shape[-1])
        stays = stays & (index >= 0)
        return self._taken(index[stays], stays.sum(-1))

    def of_sequences(self, rows: torch.Tensor) -> KeptPages:
        """Those of the sequences ``rows``, int64 on the device to be on."""
        counts = self.counts[rows.cpu()]
        index = self._index(int(self.counts.max()) if self.counts.numel() else 0)[rows.to(self.data.device)]
        return self._taken(index[index >= 0], counts).to(rows.device)

    def _taken(self, index: torch.Tensor, counts: torch.Tensor) -> KeptPages:
        mass = None if self.mass is None else self.mass[index]
        counts = counts.to("cpu", torch.int32)
        return replace(self, data=self.data[index], slots=self.slots[index], mass=mass, counts=counts)

    def to(self, device: torch.device) -> KeptPages:
        """The same pages on a device."""
        mass = None if self.mass is None else self.mass.to(device)
        return replace(self, data=self.data.to(device), slots=self.slots.to(device), mass=mass)
