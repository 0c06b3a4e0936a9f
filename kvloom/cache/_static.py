"""A packed layer of fixed size: the same tensors at every step, so that decoding compiles and replays as a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvloom import kernels
from kvloom.cache._fixed import FixedLayer, ring_tokens
from kvloom.cache._layer import filled
from kvloom.cache._storage import live_nbytes
from kvloom.pages import ExactKV, HeadPages, PagedKV, StaticKV, state_numbers
from kvloom.plan import full_pages


class StaticLoomLayer(FixedLayer):
    """`FixedLayer` of every token, allocated at the first update; sequences are equally long."""

    # -- storage ------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate storage for ``max_tokens`` tokens of ``[batch, kv_heads, tokens, head_dim]`` states."""
        super().lazy_initialization(key_states, value_states)
        window, page, batch = self.entry.window, self.page_tokens, key_states.shape[0]
        self.num_slots = full_pages(window, self.max_tokens, page)
        store = StaticKV(
            tuple(HeadPages(g.heads, g.layout, self._records(batch, g)) for g in self.pages),
            self._exact(batch, window.sinks),
            self._exact(batch, ring_tokens(window, self.max_tokens, page)),
            self._zeros(state_numbers(batch, self.model.num_kv_heads)),
            self.flags.on(self.device),
            filled(window, range(self.max_tokens + 1), page, torch.int32, self.device),
            page,
            query_turn=self._query_turn(),
            output_turn=self._output_turn(),
        )
        self._use(store)

    def _records(self, batch: int, group: HeadPages) -> torch.Tensor:
        return self._zeros(batch, len(group.heads), self.num_slots, group.layout.nbytes, dtype=torch.uint8)

    def nbytes(self) -> int:
        """Live bytes: the storage of every tensor held, however full."""
        return live_nbytes([*self._own(), *self._matrices()]) if self.is_initialized else 0

    # -- filling ------------------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `LoomLayer.update`; a pass of one token returns the layer's `StaticKV` twice.

        Raises:
            CacheError: The tokens do not fit. One token is not checked here: see `check`.
        """
        self._is_fresh = not self.is_initialized
        return super().update(key_states, value_states, *args, **kwargs)

    def _updated(self, key: torch.Tensor, value: torch.Tensor) -> PagedKV | StaticKV:
        if self._is_step(key):
            kernels.append(key, value, self.store)
            return self.store
        tokens = 0 if self._is_fresh else self._tokens()
        self._check_room(tokens + key.shape[-2])
        self._take_up(tokens)
        handle = super()._updated(key, value)
        self._put_down()
        return handle

    def _take_up(self, tokens: int) -> None:
        """Be the growing layer of the moment; its pages are views of the store."""
        self.length = tokens
        self.num_pages = self._packed(self.length)
        view = self.store.paged(slice(None), self.length, self.num_pages)
        self.pages, self.sinks, self.tail = view.pages, view.sinks, view.tail

    def _put_down(self) -> None:
        """Store what the growing layer holds now; its pages are there already."""
        store, start = self.store, self.num_pages * self.page_tokens
        slots = store.ring_slots(start, start + self.tail.tokens)
        for into, exact, at in ((store.sinks, self.sinks, slice(self.sinks.tokens)), (store.tail, self.tail, slots)):
            into.key[:, :, at], into.value[:, :, at] = exact.key, exact.value
        levels = store.levels()
        levels[:, 0], levels[:, 1] = self.length, self.num_pages
        self.tail = self.sinks = ExactKV(store.sinks.key[:, :, :0], store.sinks.value[:, :, :0])

    def _packed(self, tokens: int) -> int:
        return full_pages(self.entry.window, tokens, self.page_tokens)

    def changes_more(self, tokens: int) -> bool:
        """See `StepLayer.changes_more`."""
        return not self.entry.window.sinks <= tokens < self.max_tokens or not self.undoes_step(tokens)

    def undoes_step(self, tokens: int) -> bool:
        """See `StepLayer.undoes_step`: if no page is packed."""
        return self._packed(tokens + 1) == self._packed(tokens)

    def _extended(self, group: HeadPages, records: torch.Tensor) -> HeadPages:
        self.store.store(self._of_store(group), slice(None), self.num_pages, records)
        return self._first_pages(group, self.num_pages + records.shape[2])

    def _of_store(self, group: HeadPages) -> HeadPages:
        return next(g for g in self.store.pages if g.heads == group.heads)

    def _first_pages(self, group: HeadPages, count: int) -> HeadPages:
        return HeadPages(group.heads, group.layout, self._of_store(group).data[:, :, :count])

    # -- going back ---------------------------------------------------------------------------------------------------

    def mark(self) -> Any:
        """What `roll_back` returns to: everything but the pages, which are append-only."""
        return self._contents() if self.is_initialized else None

    def roll_back(self, mark: Any) -> None:
        """Undo every update since ``mark``, exactly."""
        if mark is None:  # allocating may be what failed: what there is of the storage is not worth keeping
            self._clear()
            vars(self).pop("store", None)
            return
        for tensor, before in mark:
            tensor.copy_(before)

    def _keep_pages(self, count: int) -> None:
        self.pages = tuple(self._first_pages(g, count) for g in self.pages)
        self.num_pages = count

    def crop(self, tokens_to_remove: int) -> None:
        """See `LoomLayer.crop`."""
        if not self.is_initialized or not tokens_to_remove:
            super().crop(tokens_to_remove)
            return
        self._take_up(self._tokens())
        super().crop(tokens_to_remove)
        if self.num_pages > self._packed(self.length):
            self._unpack_last((self.num_pages - self._packed(self.length)) * self.page_tokens)
        self._put_down()

    def reset(self) -> None:
        """Forget every token; the storage stays, so that compiled graphs hold."""
        if self.is_initialized:
            self._wipe()
            self.store.state.zero_()

    # -- storage on disk ----------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the growing layer would hold, by name."""
        if self.is_initialized:
            self._take_up(self._tokens())
        return super().tensors()

    def restore(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """See `LoomLayer.restore`.

        Raises:
            CacheError: Also if there is no room for that many tokens.
        """
        self.check(room_for=length)
        super().restore(tensors, length)
        for n, group in enumerate(self.pages):
            self.store.store(self.store.pages[n], slice(None), 0, group.data)
        self._put_down()
