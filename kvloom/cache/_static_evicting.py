"""A packed layer of fixed size that keeps some of a prompt's tokens, and every token that follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from kvloom import kernels
from kvloom.cache._evicting import EvictingLayer
from kvloom.cache._fixed import FixedLayer, ring_tokens
from kvloom.cache._fixed_bytes import new_pages
from kvloom.cache._index import numbers, of_heads
from kvloom.cache._kept_pages import KeptPages
from kvloom.cache._slots import slot_dtype
from kvloom.cache._storage import live_nbytes
from kvloom.errors import CacheError
from kvloom.pages import ExactKV, HeadPages, KeptRecords, PagedKV, StaticKV, state_numbers, stored_run
from kvloom.plan import Window


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
        """See `StepLayer.takes_steps`; not before the first prompt has ended, nor when another is expected."""
        return self.is_stored and not self.prompt_end and self.is_enabled()

    # -- filling ------------------------------------------------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        """See `LoomCache.expect_prompt`."""
        self.prompt_end = self._tokens() + tokens

    def _updated(self, key: torch.Tensor, value: torch.Tensor) -> PagedKV | StaticKV:
        if self._is_step(key):
            kernels.append(key, value, self.store)
            return self.store
        self._check_room(self._tokens() + key.shape[-2])
        self._take_up()
        return super()._updated(key, value)

    def _observe(self, query: torch.Tensor, **options: Any) -> None:
        super()._observe(query, **options)
        if not self.is_in_prompt:
            self._put_down()

    def changes_more(self, tokens: int) -> bool:
        """See `StepLayer.changes_more`."""
        if not self.takes_steps:
            return True
        slots = tokens - self.gone
        is_in_ring = self.entry.window.sinks <= slots < self.store.length
        return not is_in_ring or self._new_pages(slots) < self._new_pages(slots + 1)

    def undoes_step(self, tokens: int) -> bool:
        """See `StepLayer.undoes_step`."""
        return False

    def _tokens(self) -> int:
        return super()._tokens() if self.is_stored else self.length

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
        flat = [group.kept.extents.flatten() for group in store.pages if group.kept]
        on_host = torch.cat([store.levels()[0], self.shift, *flat]).cpu()  # the one wait
        levels, *extents = on_host.split([3, *map(len, flat)])
        tokens, _, shift = levels.tolist()
        pages = self._new_pages(tokens)  # one more than the newest token reads, if it has filled it
        self.length = tokens + shift
        self.kept = tuple(_taken(group, of, pages) for group, of in zip(store.pages, extents, strict=True))
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
        slots = self.sinks.tokens + self.tail.tokens + self.max_tokens - self.length
        kept = self._held(0) - self.sinks.tokens
        more = new_pages(self.entry.window, slots, kept, self.page_tokens)
        if not self.has_store or not self._fits(slots, kept, more):
            self._allocate(slots, kept, more)
        self._write(slots, kept, more)
        self._forget()
        self.is_stored = True

    def _new_pages(self, slots: int) -> int:
        """Pages filled since the prompt's end when so many tokens are held besides those of then."""
        kept, most = self.at_end
        return min(most, new_pages(self.entry.window, slots, kept, self.page_tokens))

    def _needs(self, group: KeptPages, more: int) -> int:
        """Records of a sequence for the pages of a group's heads, ``more`` of each still to come."""
        return max(map(sum, group.counts.tolist())) + len(group.heads) * more

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
            held = KeptRecords(
                self._zeros(batch, len(group.heads), 2), self._zeros(batch, 1, records, page, dtype=dtype)
            )
            data = self._zeros(batch, 1, records, group.layout.nbytes, dtype=torch.uint8)
            groups.append(HeadPages(group.heads, group.layout, data, held))
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

    def _write(self, slots: int, kept: int, more: int) -> None:
        """Write everything, places of tokens to come too; ``more`` pages of each head are still to come."""
        store, window, page = self.store, self.entry.window, self.page_tokens
        store.filled.copy_(_pages_filled(window, store.length, kept, page, more, self.device))
        assert store.places is not None
        if self.tail_slots.dtype != store.places.dtype:
            self._widen_slots(store.places.dtype)
        coming = stored_run(self.length, self.max_tokens, store.places.dtype, self.device)
        coming = coming.expand(*self.tail_slots.shape[:2], -1)
        of_slots = torch.cat([self.sink_slots, self.tail_slots, coming], dim=-1)
        store.places[..., :slots] = of_slots
        of_pages = of_slots[..., window.sinks : window.sinks + more * page].unflatten(-1, (more, page))
        for group, into in zip(self.kept, store.pages, strict=True):
            _give(group, into, of_heads(of_pages, group.heads))
        for part, of_exact in ((store.sinks, self.sinks), (store.tail, self.tail)):
            for to, x in ((part.key, of_exact.key), (part.value, of_exact.value)):
                to[:, :, : x.shape[2]] = x
        tokens, levels = self.sinks.tokens + self.tail.tokens, store.levels()
        self.gone, self.at_end = self.length - tokens, (kept, more)
        self.shift.fill_(self.gone)
        levels[:, 0].fill_(tokens)
        levels[:, 1].zero_()

    def _forget(self) -> None:
        """Hold no token outside the storage."""
        none = self.tail.key.new_empty((*self.tail.key.shape[:2], 0, self.tail.key.shape[3]))
        self.sinks = self.tail = ExactKV(none, none)
        self.sink_slots = self.tail_slots = none.new_empty(none.shape[:3], dtype=slot_dtype(0))
        self.tail_mass = none.new_empty(none.shape[:3], dtype=torch.float64)
        self.kept = tuple(kept.emptied() for kept in self.kept)
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


@lru_cache(maxsize=64)
def _pages_filled(
    window: Window, slots: int, kept: int, page_tokens: int, most: int, device: torch.device
) -> torch.Tensor:
    """`new_pages` by number of tokens, at most ``most``: int32 ``[slots + 1]``; one tensor for many layers."""
    counts = [min(most, new_pages(window, tokens, kept, page_tokens)) for tokens in range(slots + 1)]
    return numbers(counts, device, torch.int32)


def _records(extents: list[list[tuple[int, int]]], room: int) -> list[int]:
    """Numbers of records, in sequences of ``room`` each, by the first one and how many there are of every head."""
    return [row * room + first + n for row, heads in enumerate(extents) for first, count in heads for n in range(count)]


def _taken(group: HeadPages, extents: torch.Tensor, pages: int) -> KeptPages:
    """Records of a group's heads as records of their own.

    Args:
        group: Where from.
        extents: Those of the group, on the CPU, flat.
        pages: How many of each head have been filled since the prompt's end.
    """
    assert group.kept is not None
    first, counts = extents.view(group.kept.extents.shape).unbind(-1)
    held = torch.stack([first, counts + pages], dim=-1).tolist()
    at = numbers(_records(held, group.data.shape[2]), group.data.device)
    data, slots = group.data.flatten(0, 2)[at], group.kept.places.flatten(0, 2)[at]
    return KeptPages(group.heads, group.layout, data, slots, None, counts + pages)


def _give(group: KeptPages, into: HeadPages, coming: torch.Tensor) -> None:
    """Write kept records and where they lie, room for those to come after those of each head, and the places of all.

    Args:
        group: The records.
        into: Where to.
        coming: Places of pages to come as stored, ``[batch, heads, pages, page_tokens]``.
    """
    assert into.kept is not None
    more, room, rows = coming.shape[2], into.data.shape[2], group.counts.tolist()
    firsts = [accumulate((count + more for count in row[:-1]), initial=0) for row in rows]
    extents = [list(zip(first, row, strict=True)) for first, row in zip(firsts, rows, strict=True)]
    own = _records(extents, room)
    to_come = _records([[(first + count, more) for first, count in row] for row in extents], room)
    at = numbers(own + to_come, into.data.device)
    into.kept.extents.copy_(torch.tensor(extents, dtype=torch.int32), non_blocking=True)
    into.data.flatten(0, 2).index_copy_(0, at[: len(own)], group.data)
    into.kept.places.flatten(0, 2).index_copy_(0, at, torch.cat([group.slots, coming.flatten(0, 2)]))
