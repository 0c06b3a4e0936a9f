"""A sliding-window layer of fixed size: nothing is packed, and every step is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvloom.cache._over_sequences import OverSequences, map_in_place
from kvloom.cache._ring_kv import RingKV
from kvloom.cache._step_layer import NO_ASSISTANT, StepLayer
from kvloom.errors import CacheError


class SlidingLayer(OverSequences, CacheLayerMixin, StepLayer):
    """The newest tokens in a ring (`store`) that stays where it is, so that steps replay as graphs.

    transformers' own layer counts tokens on the host and moves them all at every step once the window is full; here
    the count is on the device, and a step writes one token. A pass of several tokens waits for the count.

    Args:
        max_tokens: Most tokens of a sequence.
        sliding_window: Tokens that a query reads, its own included.
        is_enabled: Whether the model's attention reads rings now; otherwise dense tensors are returned.
    """

    is_sliding = True
    is_graph_safe = is_graph_safe_between_pages = True
    store: RingKV

    def __init__(self, max_tokens: int, sliding_window: int, is_enabled: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.max_tokens = max_tokens
        self.window = min(max_tokens, sliding_window)
        self.is_enabled = is_enabled
        self._most = 0  # tokens held before the last `crop`: slots of those that were removed lost what lay there

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a pass of one token never waits for the device."""
        return self.is_enabled()

    @property
    def takes_steps(self) -> bool:
        """See `StepLayer.takes_steps`."""
        return self.is_enabled()

    def changes_more(self, tokens: int) -> bool:
        """See `StepLayer.changes_more`."""
        return False

    def undoes_step(self, tokens: int) -> bool:
        """See `StepLayer.undoes_step`: the token that gave its slot is not read by the next one either."""
        return True

    # -- filling ------------------------------------------------------------------------------------------------------

    # Not traced: a prompt that a user compiles may be what allocates.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate a ring for ``[batch, kv_heads, tokens, head_dim]`` states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):  # what is filled within it is written to without, too
            key, value = (x.new_zeros((*x.shape[:2], self.window, x.shape[3])) for x in (key_states, value_states))
            self.store = RingKV(key, value, torch.zeros(1, dtype=torch.int64, device=self.device))
        for tensor in self._tensors():
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; the ring twice for a pass of one token, else all that its queries read, in order."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1 and self.takes_steps:
            return self._stepped(key_states, value_states)
        tokens, new = self._tokens_held(), key_states.shape[2]
        before = self._slots(tokens, min(tokens, self.window - 1))
        into = self._slots(tokens + new, min(new, self.window))
        states = []
        for ring, x in ((self.store.key, key_states), (self.store.value, value_states)):
            states.append(torch.cat([ring[:, :, before], x], dim=2))
            ring[:, :, into] = x[:, :, -len(into) :]
        self.store.level.fill_(tokens + new)
        return tuple(states)

    def _stepped(self, key: torch.Tensor, value: torch.Tensor) -> tuple[RingKV, RingKV]:
        slot = self.store.level % self.window
        self.store.key.index_copy_(2, slot, key)
        self.store.value.index_copy_(2, slot, value)
        self.store.level.add_(1)
        return self.store, self.store

    def _slots(self, tokens: int, count: int) -> torch.Tensor:
        """Where the newest ``count`` of so many tokens lie, in order."""
        return torch.arange(tokens - count, tokens, device=self.device) % self.window

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.store.key, self.store.value, self.store.level

    def _tokens_held(self) -> int:
        return int(self.store.level) if self.is_initialized else 0

    # -- going back ---------------------------------------------------------------------------------------------------

    def mark(self) -> Any:
        """What `roll_back` returns to."""
        return [(x, x.clone()) for x in self._tensors()] if self.is_initialized else None

    def roll_back(self, mark: Any) -> None:
        """Undo every update since ``mark``, exactly."""
        if mark is None:
            self.reset()
        for tensor, before in mark or ():
            tensor.copy_(before)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would.

        Raises:
            ValueError: The number is positive.
            CacheError: Tokens that the next one would read have left the window, or there are not so many.
        """
        held, removed = self._tokens_held(), -int(tokens_to_remove)
        most = max(held, self._most)
        if removed < 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {-removed}.")
        if removed > held:
            raise CacheError(f"cannot crop {removed} tokens from a cache of {held}.")
        if removed and most > self.window and held - removed < most - 1:
            raise CacheError(
                f"cannot crop {removed} tokens: sliding windows of {self.window} tokens no longer hold those that come "
                "before; leave out max_tokens, or reset the cache."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens; see `check_crop`."""
        self.check_crop(tokens_to_remove)
        if self.is_initialized:
            self._most = max(self._tokens_held(), self._most)
            self.store.level.add_(int(tokens_to_remove))

    def reset(self) -> None:
        """Forget every token; the storage stays. Numbers go, too: NaN would survive a weight of 0."""
        self._most = 0
        for tensor in self._tensors() if self.is_initialized else ():
            tensor.zero_()

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        map_in_place([self.store.key, self.store.value] if self.is_initialized else [], change)

    # -- storage on disk ----------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is held, in order, by the names of transformers' layers."""
        if self.is_initialized:
            tokens = self._tokens_held()
            slots = self._slots(tokens, min(tokens, self.window))
            yield from (("keys", self.store.key[:, :, slots]), ("values", self.store.value[:, :, slots]))

    def restore(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """Hold the newest of ``length`` tokens, as far as `tensors`, or those of a growing layer, has them."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        slots = self._slots(length, min(tensors["keys"].shape[2], self.window))
        for ring, name in ((self.store.key, "keys"), (self.store.value, "values")):
            ring[:, :, slots] = tensors[name][:, :, -len(slots) :]
        self.store.level.fill_(length)
        self._most = length + 1  # a growing layer has one token less than a window

    # -- what generate asks -------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Refuse; see `FixedLayer.activate_past_recording`.

        Raises:
            CacheError: Always.
        """
        raise CacheError(NO_ASSISTANT)

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first update."""
        return len(self.store.key) if self.is_initialized else -1

    def get_seq_length(self) -> Any:
        """Tokens seen: 0, or an int64 tensor on the device, for which nobody waits."""
        return self.store.level[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask; of every place there is room for, if one token is to be read by operators."""
        if query_length == 1 and self.takes_steps:
            return self.max_tokens, 0
        tokens = self._tokens_held()
        before = min(tokens, self.window - 1)
        return before + query_length, tokens - before

    def get_max_length(self) -> int:
        """Most tokens that are held."""
        return self.window
