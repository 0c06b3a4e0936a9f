"""A packed layer of fixed size: the same tensors at every step, so that decoding compiles and replays as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvloom import kernels
from kvloom.cache._layer import LoomLayer, filled
from kvloom.cache._storage import live_nbytes
from kvloom.errors import CacheError
from kvloom.pages import ExactKV, HeadPages, StaticKV
from kvloom.plan import LayerPlan, Plan, Window, full_pages, head_layouts, itemsize, shared_nbytes

# A ticket for appending, and one for each tile of 8 query rows of a KV head: enough for 32 query heads a KV head.
_TICKETS_A_HEAD = 4


class StaticLoomLayer(LoomLayer):
    """`LoomLayer` with room for a fixed number of tokens, allocated at the first update; sequences are equally long.

    A pass of one token appends and attends by operators that never wait for the device. Any other pass (a prompt) reads
    the fill level, is the growing layer for its time, and stores the outcome.

    Args:
        *args: See `LoomLayer`.
        max_tokens: Most tokens of a sequence.
        expected: Device and dtype of the states to come, as far as known.
        **options: See `LoomLayer`.
    """

    def __init__(
        self,
        *args: Any,
        max_tokens: int,
        expected: tuple[torch.device, torch.dtype] | None,
        **options: Any,
    ) -> None:
        self.max_tokens = max_tokens
        super().__init__(*args, **options)
        self.is_graph_safe = expected is not None and self._is_graph_safe(*expected)
        if self.nonfinite == "clamp":
            raise CacheError('a cache of fixed size cannot clamp: leave nonfinite="error", or leave out max_tokens.')

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a pass of one token never waits for the device."""
        return self.is_graph_safe and self.is_enabled()

    def _is_graph_safe(self, device: torch.device, dtype: torch.dtype) -> bool:
        layouts = head_layouts(self.entry, self.model.num_kv_heads, self.model.head_dim, itemsize(dtype))
        return kernels.backend(device).is_graph_safe(layouts, dtype)

    # -- storage ------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate storage for ``max_tokens`` tokens of ``[batch, kv_heads, tokens, head_dim]`` states."""
        super().lazy_initialization(key_states, value_states)
        window, page, batch = self.entry.window, self.page_tokens, key_states.shape[0]
        self.is_graph_safe = self._is_graph_safe(self.device, self.dtype)
        self.num_slots = full_pages(window, self.max_tokens, page)
        self.store = StaticKV(
            tuple(HeadPages(g.heads, g.layout, self._records(batch, g)) for g in self.pages),
            self._exact(batch, window.sinks),
            self._exact(batch, ring_tokens(window, self.max_tokens, page)),
            self._zeros(_state_numbers(batch, self.model.num_kv_heads)),
            self.flags.on(self.device),
            filled(window, range(self.max_tokens + 1), page, torch.int32, self.device),
            page,
            query_turn=self._query_turn(),
            output_turn=self._output_turn(),
        )
        turns = [turn for turn in (self.store.query_turn, self.store.output_turn) if turn is not None]
        for tensor in (*self._own(), *self._matrices(), *turns, self.store.flags, self.store.filled):
            torch._dynamo.mark_static_address(tensor)
        kernels.backend(self.device).prepare(self.store)

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def _records(self, batch: int, group: HeadPages) -> torch.Tensor:
        return self._bytes(batch, len(group.heads), self.num_slots, group.layout.nbytes)

    def _exact(self, batch: int, tokens: int) -> ExactKV:
        shape = (batch, self.model.num_kv_heads, tokens, self.model.head_dim)
        key, value = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return ExactKV(key, value)

    def _sequences(self) -> list[torch.Tensor]:
        """Pages and exact tokens of every sequence."""
        if not self.is_initialized:
            return []
        store = self.store
        exact = (store.sinks.key, store.sinks.value, store.tail.key, store.tail.value)
        return [*(g.data for g in store.pages), *exact]

    def _own(self) -> list[torch.Tensor]:
        """Every tensor that only this layer holds."""
        return [*self._sequences(), *self.codebooks, self.store.state] if self.is_initialized else []

    def _matrices(self) -> list[torch.Tensor]:
        return [tensor for _, tensor in self._rotations()] if self.is_initialized else []

    def nbytes(self) -> int:
        """Live bytes: the storage of every tensor held, however full."""
        return live_nbytes([*self._own(), *self._matrices()])

    # -- filling ------------------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `LoomLayer.update`; a pass of one token returns the layer's `StaticKV` twice.

        Raises:
            CacheError: The tokens do not fit. One token is not checked here: see `check`.
        """
        self._is_fresh = not self.is_initialized
        return super().update(key_states, value_states, *args, **kwargs)

    def _is_step(self, key: torch.Tensor) -> bool:
        return key.shape[-2] == 1 and self.is_enabled()

    def _turned(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._is_step(key):
            return super()._turned(key, value)
        key = self.key_rotation.appended(key) if self.key_rotation else key
        return key, self.value_rotation.appended(value) if self.value_rotation else value

    def _updated(self, key: torch.Tensor, value: torch.Tensor) -> Any:
        if self._is_step(key):
            kernels.append(key, value, self.store)
            return self.store, self.store
        tokens = 0 if self._is_fresh else self._tokens()
        self._check_room(tokens + key.shape[-2])
        self._take_up(tokens)
        states = super()._updated(key, value)
        self._put_down()
        return states

    def check(self, *, room_for: int = 0) -> None:
        """Wait for the device, and raise what could not be raised before.

        Args:
            room_for: Tokens about to come.

        Raises:
            CacheError: Something out of range was packed, a token was lost, or there is no room.
        """
        tokens, is_bad, is_lost = 0, 0, 0
        if self.is_initialized:
            tokens, is_bad, is_lost = torch.cat([self.store.state[:1], self.store.flags]).tolist()
        if is_bad:
            raise CacheError(kernels.OUT_OF_RANGE)
        self._check_room(tokens + max(room_for, is_lost))

    def _check_room(self, asked: int) -> None:
        if asked > self.max_tokens:
            raise CacheError(
                f"the cache has room for {self.max_tokens} tokens and is asked to hold {asked}: give LoomCache a "
                "larger max_tokens."
            )

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

    def _tokens(self) -> int:
        return int(self.store.state[0])

    def _packed(self, tokens: int) -> int:
        return full_pages(self.entry.window, tokens, self.page_tokens)

    def packs_page(self, tokens: int) -> bool:
        """Whether a page is packed when a token follows so many."""
        return self._packed(tokens + 1) > self._packed(tokens)

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
        if not self.is_initialized:
            return None
        store = self.store
        exact = (store.sinks.key, store.sinks.value, store.tail.key, store.tail.value)
        return [(x, x.clone()) for x in (*exact, store.state)]

    def roll_back(self, mark: Any) -> None:
        """Undo every update since ``mark``, exactly."""
        if mark is None:
            self.reset()
        for tensor, before in mark or ():
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

    def activate_past_recording(self) -> None:
        """Refuse.

        Raises:
            CacheError: Always: tokens that may be rejected need room that a cache of fixed size does not plan for.
        """
        raise CacheError("a cache of fixed size cannot decode with an assistant: leave out max_tokens.")

    def reset(self) -> None:
        """Forget every token; the storage stays, so that compiled graphs hold."""
        if self.is_initialized:
            self.store.state.zero_()

    # -- what generate asks -------------------------------------------------------------------------------------------

    def get_seq_length(self) -> Any:
        """Tokens seen: 0, or an int32 tensor on the device, for which nobody waits."""
        return self.store.state[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: every slot there is room for, if one token is to be read by operators."""
        if query_length == 1 and self.is_enabled():
            return self.max_tokens, 0
        return (self._tokens() if self.is_initialized else 0) + query_length, 0

    def get_max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.max_tokens

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for tensor in self._sequences():
            changed = change(tensor)
            if changed.shape != tensor.shape or changed.device != tensor.device:
                raise CacheError(
                    "a cache of fixed size can neither change its batch nor leave its device: leave out max_tokens."
                )
            tensor.copy_(changed)

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


def ring_tokens(window: Window, max_tokens: int, page_tokens: int) -> int:
    """Exact tokens that a cache of fixed size has room for besides the sinks: the window and a page, in whole pages."""
    recent = max(window.recent, -int(-window.recent_ratio * max_tokens // 1))
    return (min(recent, max_tokens) + 2 * page_tokens - 1) // page_tokens * page_tokens


def fixed_nbytes(plan: Plan, batch: int, max_tokens: int, dtype: object = None) -> int:
    """Bytes of the packed layers of a cache of fixed size: what `LoomCache.nbytes` counts from its first pass on.

    Args:
        plan: What each layer stores.
        batch: Sequences.
        max_tokens: Tokens of each that there is room for.
        dtype: Compute dtype (name or torch dtype) of what stays exact; None takes the model's.
    """
    size = itemsize(dtype or plan.model.dtype)
    return sum(_layer_nbytes(plan.spec(i), plan, batch, max_tokens, size) for i in plan.model.packed_layers)


def _layer_nbytes(entry: LayerPlan, plan: Plan, batch: int, max_tokens: int, size: int) -> int:
    heads, dim = plan.model.num_kv_heads, plan.model.head_dim
    layouts = head_layouts(entry, heads, dim, size)
    page = layouts[0].page_tokens
    exact = entry.window.sinks + ring_tokens(entry.window, max_tokens, page)
    pages = full_pages(entry.window, max_tokens, page) * sum(layout.nbytes for layout in layouts)
    state = _state_numbers(batch, heads) * torch.int32.itemsize
    return batch * (pages + exact * 2 * heads * dim * size) + state + shared_nbytes(layouts, heads, dim, size)


def _state_numbers(batch: int, kv_heads: int) -> int:
    """Levels of every sequence, then counters."""
    return 2 * batch + 1 + _TICKETS_A_HEAD * batch * kv_heads
