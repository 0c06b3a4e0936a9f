"""What packed layers of fixed size have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvloom import kernels
from kvloom.cache._layer import LoomLayer
from kvloom.cache._over_sequences import map_in_place
from kvloom.cache._step_layer import NO_ASSISTANT, StepLayer
from kvloom.errors import CacheError
from kvloom.pages import ExactKV, StaticKV
from kvloom.plan import Window, head_layouts, itemsize


class FixedLayer(LoomLayer, StepLayer):
    """Room for a fixed number of tokens in tensors that stay where they are (`store`), so that steps replay as graphs.

    A pass of one token appends and attends by operators that never wait for the device. Any other pass (a prompt) reads
    the fill level, is the growing layer for its time, and stores the outcome.

    Args:
        *args: See `LoomLayer`.
        max_tokens: Most tokens of a sequence.
        expected: Device and dtype of the states to come, as far as known.
        **options: See `LoomLayer`.
    """

    store: StaticKV

    def __init__(
        self,
        *args: Any,
        max_tokens: int,
        expected: tuple[torch.device, torch.dtype] | None,
        **options: Any,
    ) -> None:
        self.max_tokens = max_tokens
        super().__init__(*args, **options)
        self.is_graph_safe = self.is_graph_safe_between_pages = False
        if expected is not None:
            self._ask_backend(*expected)
        if self.nonfinite == "clamp":
            raise CacheError('a cache of fixed size cannot clamp: leave nonfinite="error", or leave out max_tokens.')

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a pass of one token never waits for the device."""
        return self.is_graph_safe and self.is_enabled()

    @property
    def takes_steps(self) -> bool:
        """See `StepLayer.takes_steps`."""
        return self.is_enabled()

    def _ask_backend(self, device: torch.device, dtype: torch.dtype) -> None:
        layouts = head_layouts(self.entry, self.model.num_kv_heads, self.model.head_dim, itemsize(dtype))
        backend = kernels.backend(device)
        self.is_graph_safe = backend.is_graph_safe(layouts, dtype)
        self.is_graph_safe_between_pages = backend.is_graph_safe_between_pages(layouts, dtype)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See `LoomLayer.lazy_initialization`."""
        super().lazy_initialization(key_states, value_states)
        self._ask_backend(self.device, self.dtype)

    # -- storage ------------------------------------------------------------------------------------------------------

    # Not traced: a prompt that a user compiles may be what allocates.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _use(self, store: StaticKV) -> None:
        """Have ``store``, whose tensors compiled graphs may take to stay where they are."""
        self.store = store
        turns = [turn for turn in (store.query_turn, store.output_turn) if turn is not None]
        for tensor in (*self._own(), *self._matrices(), *turns, store.flags, store.filled):
            torch._dynamo.mark_static_address(tensor)
        kernels.backend(self.device).prepare(store)

    def _exact(self, batch: int, tokens: int) -> ExactKV:
        shape = (batch, self.model.num_kv_heads, tokens, self.model.head_dim)
        key, value = (self._zeros(*shape, dtype=self.dtype) for _ in range(2))
        return ExactKV(key, value)

    def _wipe(self) -> None:
        """Leave no number behind: between pages what is not held is read with weight 0, which NaN would survive."""
        for tensor in (*(group.data for group in self.store.pages), *self._exact_tensors()):
            tensor.zero_()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        with torch.inference_mode(False):  # what is filled within it is written to without, too
            return torch.zeros(shape, dtype=dtype, device=self.device)

    def _exact_tensors(self) -> tuple[torch.Tensor, ...]:
        store = self.store
        return store.sinks.key, store.sinks.value, store.tail.key, store.tail.value

    def _sequences(self) -> list[torch.Tensor]:
        """What the store holds of every sequence: pages and exact tokens."""
        return [*(g.data for g in self.store.pages), *self._exact_tensors()]

    def _own(self) -> list[torch.Tensor]:
        """Every tensor that only this layer holds."""
        return [*self._sequences(), *self.codebooks, self.store.state]

    def _matrices(self) -> list[torch.Tensor]:
        return [tensor for _, tensor in self._rotations()]

    # -- filling ------------------------------------------------------------------------------------------------------

    def _is_step(self, key: torch.Tensor) -> bool:
        return key.shape[-2] == 1 and self.takes_steps

    def _turned(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._is_step(key):
            return super()._turned(key, value)
        key = self.key_rotation.appended(key) if self.key_rotation else key
        return key, self.value_rotation.appended(value) if self.value_rotation else value

    def _level(self) -> torch.Tensor:
        """int32 ``[1]`` on the device: tokens of every sequence."""
        return self.store.state[:1]

    def check(self, *, room_for: int = 0) -> None:
        """Wait for the device, and raise what could not be raised before.

        Args:
            room_for: Tokens about to come.

        Raises:
            CacheError: Something out of range was packed, a token was lost, or there is no room.
        """
        tokens, is_bad, is_lost = 0, 0, 0
        if self.is_initialized:
            tokens, is_bad, is_lost = torch.cat([self._level(), self.flags.on(self.device)]).tolist()
        if is_bad:
            raise CacheError(kernels.OUT_OF_RANGE)
        self._check_room(tokens + max(room_for, is_lost))

    def _check_room(self, asked: int) -> None:
        if asked > self.max_tokens:
            raise CacheError(
                f"the cache has room for {self.max_tokens} tokens and is asked to hold {asked}: give LoomCache a "
                "larger max_tokens."
            )

    def _tokens(self) -> int:
        return int(self._level()) if self.is_initialized else 0

    def _contents(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every tensor of the store that a step changes, but for the pages, which are append-only; and a copy."""
        return [(x, x.clone()) for x in (*self._exact_tensors(), self.store.state)]

    # -- what generate asks -------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Refuse.

        Raises:
            CacheError: Always: tokens that may be rejected need room that a cache of fixed size does not plan for.
        """
        raise CacheError(NO_ASSISTANT)

    def get_seq_length(self) -> Any:
        """Tokens seen: 0, or an int32 tensor on the device, for which nobody waits."""
        return self._level()[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: every slot there is room for, if one token is to be read by operators."""
        if query_length == 1 and self.takes_steps:
            return self.max_tokens, 0
        return self._tokens() + query_length, 0

    def get_max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.max_tokens

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        map_in_place(self._sequences() if self.is_initialized else [], change)


def ring_tokens(window: Window, max_tokens: int, page_tokens: int) -> int:
    """Exact tokens that a cache of fixed size has room for besides the sinks: the window and a page, in whole pages."""
    recent = max(window.recent, -int(-window.recent_ratio * max_tokens // 1))
    return (min(recent, max_tokens) + 2 * page_tokens - 1) // page_tokens * page_tokens
