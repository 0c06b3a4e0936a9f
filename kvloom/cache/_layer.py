"""One packed layer: sinks, append-only pages, and an exact tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from kvloom import kernels
from kvloom.cache._autocast import without_autocast
from kvloom.cache._flags import Flags
from kvloom.cache._index import by_head, of_heads
from kvloom.cache._over_sequences import OverSequences
from kvloom.cache._rope import Rope
from kvloom.cache._rotation import side_rotation
from kvloom.cache._storage import live_nbytes
from kvloom.errors import CacheError, ModelError
from kvloom.pages import (
    PASSTHROUGH_BITS,
    ExactKV,
    Format,
    HeadPages,
    PagedKV,
    PageLayout,
    Role,
    StaticKV,
    codebook_points,
    pack_side,
    page_layout,
)
from kvloom.plan import (
    Fingerprint,
    LayerPlan,
    Prefill,
    Window,
    calibrated_formats,
    full_pages,
    head_layouts,
    itemsize,
)

NonFinite = Literal["error", "clamp"]
SIDES: tuple[Role, Role] = ("key", "value")
_CLAMP = 65280.0  # a number of every dtype; the grid's rounding still fits in fp16's 65504
_EXACT = Format(PASSTHROUGH_BITS, "per_token", 1)
NOT_THIS_PLANS = "the cache file's tensors do not have the sizes this plan gives them; it is damaged, make it again."


class Mark(NamedTuple):
    """What a layer held at some moment; pages are append-only, so their number tells which."""

    length: int
    num_pages: int
    sinks: ExactKV
    tail: ExactKV


class LoomLayer(OverSequences, CacheLayerMixin):
    """Cache layer whose full pages are packed by a plan's entry.

    A page is encoded once, when it is full and out of the exact window, and never touched again. What a query reads is
    set by its position alone for single-token passes and under ``prefill="quantized"``; under ``"exact"`` the tokens of
    one pass read each other, and the tail as it was, exactly.

    Args:
        entry: The plan's entry for the layer.
        model: Shape of the cache.
        prefill: See `kvloom.Plan`.
        nonfinite: What packing does with NaN, infinities and magnitudes above 65504: ``error``, or ``clamp``
            (NaN becomes 0, everything else at most 65280).
        flags: Where a device notes what it packed out of range; whoever calls `update` checks them.
        rope: The model's rotary embedding, for keys that are packed before it; None if the plan has none.
        is_enabled: Whether the model's attention reads packed pages now; otherwise dense tensors are returned.
        matrices: The plan's calibrated rotations of the layer, by side: float16 ``[kv_heads, head_dim, head_dim]``.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        entry: LayerPlan,
        model: Fingerprint,
        *,
        prefill: Prefill,
        nonfinite: NonFinite,
        flags: Flags,
        rope: Rope | None,
        is_enabled: Callable[[], bool],
        matrices: Mapping[Role, torch.Tensor],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entry = entry
        self.model = model
        self.prefill = prefill
        self.nonfinite = nonfinite
        self.flags = flags
        self.rope = rope
        self.is_enabled = is_enabled
        self.matrices = matrices
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0
        self.num_pages = 0
        self.page_tokens = 0
        self.pages: tuple[HeadPages, ...] = ()
        self.codebooks: tuple[torch.Tensor, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate empty storage for the shape, dtype and device of ``[batch, kv_heads, tokens, head_dim]`` states."""
        self._check_shape(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        layouts = head_layouts(self.entry, self.model.num_kv_heads, self.model.head_dim, itemsize(self.dtype))
        self.page_tokens = layouts[0].page_tokens
        batch = key_states.shape[0]
        self.pages = tuple(
            HeadPages(
                heads,
                layouts[heads[0]],
                self._bytes(batch, len(heads), 0, layouts[heads[0]].nbytes),
            )
            for heads in _heads_by_layout(layouts)
        )
        formats = calibrated_formats(layouts)
        self.codebooks = tuple(codebook_points(fmt.points, self.device).clone() for _, fmt in formats)
        self.key_rotation, self.value_rotation = (
            side_rotation([getattr(x, side) for x in layouts], self.matrices.get(side), self.dtype, self.device)
            for side in SIDES
        )
        self.sinks = ExactKV(key_states[:, :, :0].clone(), value_states[:, :, :0].clone())
        self.tail = ExactKV(key_states[:, :, :0].clone(), value_states[:, :, :0].clone())
        self.is_initialized = True

    def _bytes(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def _check_shape(self, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = (self.model.num_kv_heads, self.model.head_dim)
        for name, states in (("keys", key), ("values", value)):
            if states.dim() != 4 or (states.shape[1], states.shape[3]) != expected:
                raise ModelError(
                    f"the model's {name} have shape {list(states.shape)} where the plan expects "
                    f"[batch, {expected[0]}, tokens, {expected[1]}]; make a plan for this model."
                )

    # -- filling ------------------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append tokens; return what attention is to read.

        Args:
            key_states: ``[batch, kv_heads, tokens, head_dim]``.
            value_states: The same shape.
            *args: Ignored, transformers' own.
            **kwargs: Ignored, transformers' own.

        Returns:
            The layer's `PagedKV` twice, or dense keys and values where the model's attention cannot read pages.
        """
        with without_autocast(key_states.device):
            return self._update(*_of_one_dtype(key_states, value_states))

    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_append(key_states, value_states)
        handle = self._updated(*self._turned(key_states, value_states))
        if isinstance(handle, StaticKV):
            return handle, handle
        reads_more = self._reads_more(key_states.shape[-2])
        if not self.is_enabled():
            return self._dense(handle) if reads_more else (key_states, value_states)
        if not reads_more:
            handle = replace(handle, own=ExactKV(key_states, value_states))
        return handle, handle

    def _reads_more(self, queries: int) -> bool:
        """Whether the tokens of the pass just appended may read other states than each other's, exact.

        A pass of one token reads as a decode step does, whatever is held.
        """
        return self.prefill != "exact" or queries == 1 or self.length > queries

    def _turned(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States as they are cached."""
        key = self.key_rotation.cached(key) if self.key_rotation else key
        return key, self.value_rotation.cached(value) if self.value_rotation else value

    def _restored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached as the model's states."""
        key = self.key_rotation.restored(key) if self.key_rotation else key
        return key, self.value_rotation.restored(value) if self.value_rotation else value

    def _query_turn(self) -> torch.Tensor | None:
        return self.key_rotation.dual if self.key_rotation else None

    def _output_turn(self) -> torch.Tensor | None:
        return self.value_rotation.output_turn if self.value_rotation else None

    def _updated(self, key: torch.Tensor, value: torch.Tensor) -> PagedKV | StaticKV:
        """Append states as they are cached; return what attention is to read."""
        if self.record_past:
            self._pack()
        self._append(key, value)
        queries = key.shape[-2]
        if self._reads_own_pages():
            return self._pack_under(queries)
        visible = torch.full((queries,), self.num_pages, device=self.device)
        handle = self._handle(self.tail, visible)
        if not self.record_past:
            self._pack()
        return handle

    def _check_append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._check_shape(key, value)
        if key.shape[0] != self.batch_size:
            raise CacheError(
                f"the cache holds a batch of {self.batch_size} and got one of {key.shape[0]}; use a new cache, or "
                "reset() this one."
            )
        if key.dtype != self.dtype:
            raise CacheError(f"the cache holds {self.dtype} states and got {key.dtype}; use a new cache.")

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        missing = min(max(0, self.entry.window.sinks - self.sinks.tokens), key.shape[-2])
        if missing:
            self.sinks = _joined(self.sinks, key[:, :, :missing], value[:, :, :missing])
        self.tail = _joined(self.tail, key[:, :, missing:], value[:, :, missing:])
        self.length += key.shape[-2]

    def _pack(self) -> None:
        """Encode the pages that are full and out of the exact window."""
        new = full_pages(self.entry.window, self.length, self.page_tokens) - self.num_pages
        if new <= 0:
            return
        tokens = new * self.page_tokens
        key, value = self.tail.key[:, :, :tokens], self.tail.value[:, :, :tokens]
        first = self._first_slot(self.num_pages)
        self.pages = tuple(
            self._extended(g, self._encoded(of_heads(key, g.heads), of_heads(value, g.heads), g.layout, first))
            for g in self.pages
        )
        self.num_pages += new
        self.tail = ExactKV(self.tail.key[:, :, tokens:].clone(), self.tail.value[:, :, tokens:].clone())

    def _extended(self, group: HeadPages, records: torch.Tensor) -> HeadPages:
        """The pages with records ``[batch, heads, pages, layout.nbytes]`` after them."""
        return HeadPages(group.heads, group.layout, torch.cat([group.data, records], dim=2))

    def _encoded(
        self, key: torch.Tensor, value: torch.Tensor, layout: PageLayout, slots: int | torch.Tensor
    ) -> torch.Tensor:
        """Records of whole pages; ``slots`` as in `Rope.before`."""
        if self.rope and layout.key.fmt.pre_rope:
            key = self.rope.before(key, slots)
        key, value = (
            x if self.nonfinite == "error" or side.fmt.is_passthrough else _clamped(x)
            for x, side in ((key, layout.key), (value, layout.value))
        )
        return kernels.backend(self.device).encode(key, value, layout, self.flags.pending(self.device))

    def _reads_own_pages(self) -> bool:
        """Whether a query of the pass just appended is to read a page that earlier tokens of the pass fill."""
        if self.prefill == "exact":
            return False
        return full_pages(self.entry.window, self.length - 1, self.page_tokens) > self.num_pages

    def _pack_under(self, queries: int) -> PagedKV:
        """Pack, and let every query of the pass read what decoding token by token would have shown it."""
        if not self.is_enabled():
            raise CacheError(
                'prefill="quantized" needs attention that reads packed pages: call kvloom.enable(model), or use '
                'prefill="exact".'
            )
        tail, pages, before = self.tail, self.pages, self.num_pages
        self._pack()
        tokens = range(self.length - queries, self.length)
        visible = filled(self.entry.window, tokens, self.page_tokens, torch.int64, self.device)
        handle = self._handle(tail, visible.clamp(min=before))
        if self.record_past:
            self.tail, self.pages, self.num_pages = tail, pages, before
        return handle

    def _handle(self, tail: ExactKV, visible: torch.Tensor) -> PagedKV:
        return PagedKV(
            self._readable(),
            self.sinks,
            tail,
            self.length,
            self.page_tokens,
            self.num_pages,
            visible,
            self._query_turn(),
            self._output_turn(),
        )

    def _readable(self) -> tuple[HeadPages, ...]:
        """The pages as attention is to read them: with keys before RoPE they are decoded first, and have it again."""
        pages = self.pages
        if not any(g.layout.key.fmt.pre_rope for g in pages):
            return pages
        heads = tuple(range(self.model.num_kv_heads))
        layout = page_layout(_EXACT, _EXACT, self.model.head_dim, itemsize(self.dtype), self.page_tokens)
        shape = (self.num_pages, self.page_tokens)
        sides = zip(self._unpacked(pages), (layout.key, layout.value), strict=True)
        records = torch.cat([pack_side(x.unflatten(2, shape), (), side) for x, side in sides], dim=-1)
        return (HeadPages(heads, layout, records),)

    # -- the dense way ------------------------------------------------------------------------------------------------

    def _dense(self, handle: PagedKV) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._unpacked(handle.pages)
        key = torch.cat([handle.sinks.key, key, handle.tail.key], dim=-2)
        value = torch.cat([handle.sinks.value, value, handle.tail.value], dim=-2)
        return self._restored(key, value)

    def _unpacked(self, pages: tuple[HeadPages, ...], first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages, page ``first`` and what follows it, ``[batch, kv_heads, tokens, head_dim]``."""
        heads = [g.heads for g in pages]
        keys, values = zip(*(self._decoded(g, first) for g in pages), strict=True)
        return by_head(keys, heads), by_head(values, heads)

    def _decoded(self, group: HeadPages, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = kernels.backend(self.device).decode(group.data, group.layout, self.dtype)
        if self.rope and group.layout.key.fmt.pre_rope:
            key = self.rope.after(key, self._slots_of(group, first))
        return key, value

    def _slots_of(self, group: HeadPages, first: int) -> int | torch.Tensor:
        """Slots of a group's pages from page ``first`` on, as `Rope.after` takes them."""
        return self._first_slot(first)

    def _first_slot(self, page: int) -> int:
        return self.entry.window.sinks + page * self.page_tokens

    # -- going back ---------------------------------------------------------------------------------------------------

    def mark(self) -> Mark | None:
        """What `roll_back` returns to; None before the first update."""
        return Mark(self.length, self.num_pages, self.sinks, self.tail) if self.is_initialized else None

    def roll_back(self, mark: Mark | None) -> None:
        """Undo every update since ``mark``, exactly."""
        if mark is None:
            self._clear()
            return
        self._keep_pages(mark.num_pages)
        self.length, self.sinks, self.tail = mark.length, mark.sinks, mark.tail

    def _keep_pages(self, count: int) -> None:
        if count < self.num_pages:
            self.pages = tuple(HeadPages(g.heads, g.layout, g.data[:, :, :count].clone()) for g in self.pages)
            self.num_pages = count

    # -- what generate asks -------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first update."""
        return int(self.tail.key.shape[0]) if self.is_initialized else -1

    @property
    def is_in_prompt(self) -> bool:
        """Whether a prompt is not complete yet, so that the layer holds more than its plan says."""
        return False

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: every slot, from the first."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: the layer grows."""
        return -1

    def activate_past_recording(self) -> None:
        """Pack a pass's tokens only when `crop` or the next pass confirms them: rejected ones never reach a page."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens.

        Tokens that are already packed come back into the tail as decoded, and are packed again with what follows.

        Raises:
            ValueError: The number is positive.
            CacheError: It is more than the cache holds.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}.")
        if not self.is_initialized:
            return
        if tokens_to_remove:
            self._remove(-int(tokens_to_remove))  # transformers 5.17 passes a tensor
        if self.record_past:
            self._pack()

    def _remove(self, remove: int) -> None:
        if remove > self.length:
            raise CacheError(f"cannot crop {remove} tokens from a cache of {self.length}.")
        if remove > self.tail.tokens:
            self._unpack_last(remove - self.tail.tokens)
        self.tail = ExactKV(*_cut(self.tail, max(0, self.tail.tokens - remove)))
        self.length -= remove
        self.sinks = ExactKV(*_cut(self.sinks, min(self.sinks.tokens, self.length)))

    def _unpack_last(self, tokens: int) -> None:
        """Bring the newest pages that hold ``tokens`` packed tokens back into the tail."""
        count = min(self.num_pages, -(-tokens // self.page_tokens))
        if not count:
            return
        keep = self.num_pages - count
        last = tuple(HeadPages(g.heads, g.layout, g.data[:, :, keep:]) for g in self.pages)
        key, value = self._unpacked(last, keep)
        self.tail = ExactKV(torch.cat([key, self.tail.key], -2), torch.cat([value, self.tail.value], -2))
        self._keep_pages(keep)

    def reset(self) -> None:
        """Forget every token."""
        self._clear()
        self.record_past = False

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        self.pages = tuple(HeadPages(g.heads, g.layout, change(g.data)) for g in self.pages)
        self.sinks = ExactKV(change(self.sinks.key), change(self.sinks.value))
        self.tail = ExactKV(change(self.tail.key), change(self.tail.value))

    # -- storage ------------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything resident, by name."""
        if not self.is_initialized:
            return
        for n, g in enumerate(self.pages):
            yield f"pages.{n}", g.data
        for n, points in enumerate(self.codebooks):
            yield f"codebooks.{n}", points
        yield from (("sinks.key", self.sinks.key), ("sinks.value", self.sinks.value))
        yield from (("tail.key", self.tail.key), ("tail.value", self.tail.value))
        yield from self._rotations()

    def _rotations(self) -> Iterator[tuple[str, torch.Tensor]]:
        for side, rotation in zip(SIDES, (self.key_rotation, self.value_rotation), strict=True):
            if rotation:
                yield from ((f"rotation.{side}.{name}", tensor) for name, tensor in rotation.tensors())

    def nbytes(self) -> int:
        """Live bytes: the storage of every tensor held."""
        return live_nbytes(tensor for _, tensor in self.tensors())

    def restore(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """Take over saved `tensors`.

        Raises:
            CacheError: The names, shapes or dtypes are not those the plan gives a cache of that length.
        """
        tail = tensors.get("tail.key", torch.empty(0))
        if tail.shape[1::2] != (self.model.num_kv_heads, self.model.head_dim):
            raise CacheError(NOT_THIS_PLANS)
        self._clear()
        self.lazy_initialization(tail[:, :, :0], tail[:, :, :0])
        sinks = min(length, self.entry.window.sinks)
        pages, rest = divmod(length - sinks - tail.shape[2], self.page_tokens)
        expected = {
            f"{part}.{side}": ((*tail.shape[:2], tokens, tail.shape[3]), tail.dtype)
            for part, tokens in (("sinks", sinks), ("tail", tail.shape[2]))
            for side in ("key", "value")
        }
        for n, g in enumerate(self.pages):
            expected[f"pages.{n}"] = ((tail.shape[0], len(g.heads), pages, g.layout.nbytes), torch.uint8)
        for n, points in enumerate(self.codebooks):
            expected[f"codebooks.{n}"] = (tuple(points.shape), points.dtype)
        expected |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._rotations()}
        if rest or expected != {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}:
            raise CacheError(NOT_THIS_PLANS)
        self.length, self.num_pages = length, pages
        self.sinks = ExactKV(tensors["sinks.key"], tensors["sinks.value"])
        self.tail = ExactKV(tensors["tail.key"], tensors["tail.value"])
        self.pages = tuple(HeadPages(g.heads, g.layout, tensors[f"pages.{n}"]) for n, g in enumerate(self.pages))


def _heads_by_layout(layouts: tuple[Any, ...]) -> list[tuple[int, ...]]:
    groups: dict[Any, list[int]] = {}
    for head, layout in enumerate(layouts):
        groups.setdefault(layout, []).append(head)
    return [tuple(heads) for heads in groups.values()]


@lru_cache(maxsize=64)
def filled(window: Window, tokens: range, page_tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Full pages by number of tokens, ``[len(tokens)]``; one tensor for all layers of a window."""
    return torch.tensor([full_pages(window, n, page_tokens) for n in tokens], dtype=dtype, device=device)


def _of_one_dtype(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States in the wider of their dtypes: under autocast a rotary embedding makes keys fp32, and not values."""
    dtype = torch.promote_types(key.dtype, value.dtype)
    return key.to(dtype), value.to(dtype)


def _clamped(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(0.0).clamp(-_CLAMP, _CLAMP)


def _joined(exact: ExactKV, key: torch.Tensor, value: torch.Tensor) -> ExactKV:
    return ExactKV(torch.cat([exact.key, key], dim=-2), torch.cat([exact.value, value], dim=-2))


def _cut(exact: ExactKV, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    if tokens == exact.tokens:
        return exact.key, exact.value
    return exact.key[:, :, :tokens].clone(), exact.value[:, :, :tokens].clone()
