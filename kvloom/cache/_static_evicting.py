"""A packed layer of fixed size that keeps some of a prompt's tokens, and every token that follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvloom import kernels
from kvloom.cache._evicting import EvictingLayer
from kvloom.cache._fixed import FixedLayer, ring_tokens, state_numbers
from kvloom.cache._fixed_bytes import new_pages
from kvloom.cache._kept_pages import KeptPages
from kvloom.cache._slots import slot_dtype
from kvloom.cache._storage import live_nbytes
from kvloom.errors import CacheError
from kvloom.pages import ExactKV, HeadPages, KeptRecords, StaticKV, places, stored


class StaticEvictingLayer(FixedLayer, EvictingLayer):
    """`EvictingLayer` that, once a prompt is complete, puts what is kept in storage of fixed size.

    The storage has room for that and for the tokens up to ``max_tokens``, so its size is known when the first prompt
    ends. It stays for later prompts if they fit; sequences are equally long. Slots of its `StaticKV` number sinks and
    what is not in the pages of the prompt's end.

    Args:
        *args: See `FixedLayer`.
        **options: See `FixedLayer` and `EvictingLayer`.

    Raises:
        CacheError: The policy wants to see every step.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.policy.watches_steps:
            raise CacheError(
                f"a cache of fixed size does not show policy {self.policy.name!r} its steps: leave out max_tokens, or "
                "choose a policy that evicts when a prompt ends (streaming_llm does with decode: false)."
            )

    def _clear(self) -> None:
        super()._clear()
        self.is_stored = self.has_store = False

    @property
    def takes_steps(self) -> bool:
        """See `FixedLayer.takes_steps`; not before the first prompt has ended, nor when another is expected."""
        return self.is_stored and not self.prompt_end and self.is_enabled()

    # -- filling ------------------------------------------------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        """See `LoomCache.expect_prompt`."""
        self.prompt_end = self._tokens() + tokens

    def _updated(self, key: torch.Tensor, value: torch.Tensor) -> Any:
        if self._is_step(key):
            kernels.append(key, value, self.store)
            return self.store, self.store
        self._check_room(self._tokens() + key.shape[-2])
        self._take_up()
        return super()._updated(key, value)

    def _observe(self, query: torch.Tensor, **options: Any) -> None:
        super()._observe(query, **options)
        if not self.is_in_prompt:
            self._put_down()

    def changes_more(self, tokens: int) -> bool:
        """See `FixedLayer.changes_more`."""
        return not self.takes_steps or tokens not in self.ring_steps

    def _level(self) -> torch.Tensor:
        if self.is_stored:
            return self.store.state[:1] + self.shift
        return torch.tensor([self.length], dtype=torch.int32, device=self.device)

    # -- from and to the storage --------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Be the growing layer of the moment, if its tokens are in the storage: a copy of them."""
        if not self.is_stored:
            return
        store = self.store
        tokens = int(store.levels()[0, 0])
        pages = int(store.filled[tokens])  # one more than the newest token reads, if it has filled it
        self.length = tokens + int(self.shift)
        self.kept = tuple(_taken(group, pages) for group in store.pages)
        held = store.paged(slice(None), tokens, pages)
        self.sinks = ExactKV(held.sinks.key.clone(), held.sinks.value.clone())
        self.tail = held.tail
        assert store.places is not None
        self.sink_slots = store.places[:, :, : self.sinks.tokens].clone()
        self.tail_slots = store.places[:, :, tokens - self.tail.tokens : tokens].clone()
        if (dtype := slot_dtype(self.length)) != self.tail_slots.dtype:
            self._widen_slots(dtype)
        self._count_pages()
        self.is_stored = False

    def _put_down(self) -> None:
        """Store what the growing layer holds now, and forget it."""
        tokens = self.sinks.tokens + self.tail.tokens
        slots, per_head = tokens + self.max_tokens - self.length, self._heads()
        kept = sum(len(group.data) for group in self.kept) * self.page_tokens // per_head
        more = int(new_pages(self.room, torch.tensor(slots), kept))
        if not self.has_store or not self._fits(slots, kept, more):
            self._allocate(slots, kept, more)
        self._write(tokens, kept, more)
        self._forget()
        self.is_stored = True

    def _needs(self, group: KeptPages, more: int) -> int:
        """Records of a sequence for the pages of a group's heads, ``more`` of each still to come."""
        return int(group.counts.sum(-1).max()) + len(group.heads) * more

    def _fits(self, slots: int, kept: int, more: int) -> bool:
        store, ring = self.store, ring_tokens(self.entry.window, slots + kept, self.page_tokens)
        pages = zip(self.kept, store.pages, strict=True)
        return (
            store.length >= slots
            and store.tail.tokens >= ring
            and store.tail.key.shape[0] == self.batch_size
            and all(group.data.shape[2] >= self._needs(of, more) for of, group in pages)
        )

    def _allocate(self, slots: int, kept: int, more: int) -> None:
        batch, page, window = self.batch_size, self.page_tokens, self.entry.window
        dtype, heads = slot_dtype(self.max_tokens), self.model.num_kv_heads
        groups = []
        for group in self.kept:
            records = self._needs(group, more)
            of_heads = KeptRecords(
                self._zeros(batch, len(group.heads), 2), self._zeros(batch, 1, records, page, dtype=dtype)
            )
            data = self._zeros(batch, 1, records, group.layout.nbytes, dtype=torch.uint8)
            groups.append(HeadPages(group.heads, group.layout, data, of_heads))
        self.shift = self._zeros(1)
        self.has_store = True
        self._use(
            StaticKV(
                tuple(groups),
                self._exact(batch, window.sinks),
                self._exact(batch, ring_tokens(window, slots + kept, page)),
                self._zeros(state_numbers(batch, heads)),
                self.flags.on(self.device),
                self._zeros(slots + 1),
                page,
                query_turn=self._query_turn(),
                output_turn=self._output_turn(),
                places=self._zeros(batch, heads, slots, dtype=dtype),
            )
        )

    def _write(self, tokens: int, kept: int, more: int) -> None:
        """Write everything, places of tokens to come too; ``more`` pages of each head are still to come."""
        store, sinks = self.store, self.store.sinks.tokens
        shift = self.length - tokens
        filled = new_pages(self.room, torch.arange(store.length + 1), kept).clamp_max(more)
        store.filled.copy_(filled)
        only_ring = filled.diff() == 0
        only_ring[:sinks] = False
        self.ring_steps = frozenset((only_ring.nonzero().flatten() + self.length - tokens).tolist())
        assert store.places is not None
        slot = torch.arange(tokens, store.length, device=self.device) + shift
        exact = torch.cat([places(self.sink_slots), places(self.tail_slots)], dim=-1)
        exact = torch.cat([exact, slot.expand(*exact.shape[:2], -1)], dim=-1)
        store.places.copy_(stored(exact, store.places.dtype))
        coming = store.places[:, :, sinks : sinks + more * self.page_tokens].unflatten(-1, (more, self.page_tokens))
        for group, into in zip(self.kept, store.pages, strict=True):
            _give(group, into, more, coming[:, list(group.heads)])
        for part, of_exact, at in (
            (store.sinks, self.sinks, slice(self.sinks.tokens)),
            (store.tail, self.tail, store.ring_slots(0, self.tail.tokens)),
        ):
            part.key[:, :, at], part.value[:, :, at] = of_exact.key, of_exact.value
        self.shift.fill_(shift)
        store.levels()[:, 0], store.levels()[:, 1] = tokens, 0

    def _forget(self) -> None:
        """Hold no token outside the storage."""
        none = slice(0)
        self.kept = tuple(kept.only(torch.zeros((*kept.counts.shape, 0), device=self.device) > 0) for kept in self.kept)
        self.sinks, self.tail = (
            ExactKV(x.key[:, :, none].clone(), x.value[:, :, none].clone()) for x in (self.sinks, self.tail)
        )
        self.sink_slots, self.tail_slots = (x[:, :, none].clone() for x in (self.sink_slots, self.tail_slots))
        self.tail_mass = self.tail_mass[:, :, none].clone()
        self.num_pages = 0

    # -- going back ---------------------------------------------------------------------------------------------------

    def mark(self, new: int = 0) -> Any:
        """See `EvictingLayer.mark`; of a step, what it changes in the storage."""
        if new == 1 and self.takes_steps:
            return self._contents()
        if self.is_initialized:
            self._take_up()
        return super().mark(new)

    def roll_back(self, mark: Any) -> None:
        """Undo every update since ``mark``, exactly."""
        if isinstance(mark, list):
            for tensor, before in mark:
                tensor.copy_(before)
            return
        super().roll_back(mark)
        if self.is_initialized and self.length and not self.is_in_prompt:
            self._put_down()

    def reset(self) -> None:
        """Forget every token; the storage stays, so that compiled graphs hold if what comes fits in it."""
        self.record_past = False
        if self.is_initialized:
            self._forget()
            self.length = self.prompt_end = 0
            self.is_unread = self.is_stored = False
            self.queries = None
            if self.has_store:
                self._wipe()

    # -- storage ------------------------------------------------------------------------------------------------------

    def _sequences(self) -> list[torch.Tensor]:
        kept = [part for group in self.store.pages if group.kept for part in (group.kept.extents, group.kept.places)]
        assert self.store.places is not None
        return [*super()._sequences(), *kept, self.store.places]

    def _own(self) -> list[torch.Tensor]:
        return [*super()._own(), self.shift, self.store.filled]

    def nbytes(self) -> int:
        """Live bytes: the storage of every tensor held, however full."""
        outside = [tensor for _, tensor in super().tensors()]
        return live_nbytes([*outside, *(self._own() if self.has_store else ())])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_stored:
            super()._map(change)
        else:
            EvictingLayer._map(self, change)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the growing layer would hold, by name."""
        growing = copy.copy(self)
        if self.is_initialized:
            growing._take_up()
        return EvictingLayer.tensors(growing)

    def restore(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """See `LoomLayer.restore`.

        Raises:
            CacheError: Also if there is no room for that many tokens.
        """
        self._check_room(length)
        super().restore(tensors, length)
        self._put_down()


def _row_and_record(counts: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and record of the first ``counts [batch, heads]`` records from ``first`` on, head by head."""
    most = torch.arange(int(counts.max()) if counts.numel() else 0)
    row, head, page = (most < counts[..., None]).nonzero().unbind(1)
    return row, first[row, head] + page


def _taken(group: HeadPages, pages: int) -> KeptPages:
    """Records of a group's heads, ``pages`` of each filled since the prompt's end, as records of their own."""
    assert group.kept is not None
    first, counts = group.kept.extents.long().cpu().unbind(-1)
    row, record = (x.to(group.data.device) for x in _row_and_record(counts + pages, first))
    data, slots = group.data[row, 0, record], group.kept.places[row, 0, record]
    return KeptPages(group.heads, group.layout, data, slots, None, (counts + pages).int())


def _give(group: KeptPages, into: HeadPages, more: int, coming: torch.Tensor) -> None:
    """Write kept records and where they lie, room for ``more`` after those of each head, and the places of those.

    Args:
        group: The records.
        into: Where to.
        more: Pages to come.
        coming: Their places as stored, ``[batch, heads, more, page_tokens]``.
    """
    assert into.kept is not None
    counts = group.counts.long()
    first = (counts + more).cumsum(-1) - counts - more
    into.kept.extents.copy_(torch.stack([first, counts], dim=-1))
    device = into.data.device
    row, record = (x.to(device) for x in _row_and_record(counts, first))
    into.data[row, 0, record] = group.data
    into.kept.places[row, 0, record] = stored(places(group.slots), into.kept.places.dtype)
    row, record = (x.to(device) for x in _row_and_record(torch.full_like(counts, more), first + counts))
    into.kept.places[row, 0, record] = coming.flatten(0, 2)
