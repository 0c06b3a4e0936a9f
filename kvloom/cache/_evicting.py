"""A packed layer that keeps some of its tokens: the others leave the storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvloom.cache._index import by_head, joined, named, of_heads, taken
from kvloom.cache._kept_kv import KeptKV, real_places
from kvloom.cache._kept_pages import KeptPages
from kvloom.cache._layer import NOT_THIS_PLANS, SIDES, LoomLayer
from kvloom.cache._slots import slot_dtype
from kvloom.errors import CacheError
from kvloom.eviction import Chosen, Reading, Room, Seen, best, choose
from kvloom.pages import ExactKV, HeadPages, KeptRecords, PagedKV, StaticKV, places, stored, stored_run

# Scores of what leaves first and of what never leaves; sums of a page of them are finite, but for the latter.
_PADDING, _PROTECTED = -1e30, torch.inf


class EvictingLayer(LoomLayer):
    """`LoomLayer` that keeps the tokens its policy chooses, for each KV head its own.

    The tokens of a prompt stay exact until it is complete; then the policy chooses, the kept tokens are put in order of
    position, and full pages of them are packed. A pass of several tokens is a prompt, unless `expect_prompt` says that
    more of it comes. It happens when attention has read the pass, layer by layer, so that one layer at a time holds a
    whole prompt.

    A page is encoded once and never touched again, so what is packed leaves in whole pages. At the end of a second
    prompt its tokens and those of the exact tail compete with the pages: some of them, the best, are taken as they are,
    then the best among the pages and the further tokens by the page (`kvloom.eviction.choose`). While tokens come one
    by one, a policy whose budget is a ceiling lets the page of the least score go when the ceiling is passed. Otherwise
    they are all kept until the next prompt ends.

    Padding leaves first. Sinks are the first real tokens, and never leave.

    Args:
        *args: See `LoomLayer`.
        room: How many tokens the layer keeps, and the policy.
        **options: See `LoomLayer`.
    """

    is_croppable = False

    def __init__(self, *args: Any, room: Room, **options: Any) -> None:
        self.room = room
        self.policy = room.policy
        super().__init__(*args, **options)

    def _clear(self) -> None:
        super()._clear()
        self.prompt_end = 0
        self.is_unread = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See `LoomLayer.lazy_initialization`."""
        super().lazy_initialization(key_states, value_states)
        none = (*key_states.shape[:2], 0)
        self.sink_slots = self.tail_slots = torch.zeros(none, dtype=slot_dtype(0), device=self.device)
        self.tail_mass = torch.zeros(none, dtype=torch.float64, device=self.device)
        self.queries: torch.Tensor | None = None

    # The base class allocates and reads rectangular pages; what is held are records.

    @property
    def pages(self) -> tuple[HeadPages, ...]:
        """Pages by layout, padded to the most pages of a head."""
        return tuple(kept.padded(self.num_pages) for kept in self.kept)

    @pages.setter
    def pages(self, groups: tuple[HeadPages, ...]) -> None:
        self.kept = tuple(KeptPages.empty(group, has_mass=self.policy.sums_attention) for group in groups)

    # -- filling ------------------------------------------------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        """See `LoomCache.expect_prompt`."""
        self.prompt_end = self.length + tokens

    @property
    def is_in_prompt(self) -> bool:
        """Whether more passes of a prompt are to come, or attention has not read the last one."""
        return self.is_initialized and (self.is_unread or self.length < self.prompt_end)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `LoomLayer.update`; tokens leave when attention has read the pass.

        Raises:
            CacheError: Attention cannot read packed pages, or has not read the last pass.
        """
        if not self.is_enabled():
            raise CacheError(
                "a plan that evicts needs attention that shows a policy its queries and its mask: call "
                "kvloom.enable(model)."
            )
        if self.is_unread:
            raise CacheError(
                "nothing attended to the tokens appended last, so no policy could choose among them: run the model's "
                "attention after every update."
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def _updated(self, key: torch.Tensor, value: torch.Tensor) -> PagedKV | StaticKV:
        self._append(key, value)
        self.is_unread = True
        return self._kept_handle(key.shape[-2])

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        after = self.length + key.shape[-2]
        if (dtype := slot_dtype(after)) != self.tail_slots.dtype:
            self._widen_slots(dtype)
        new = stored_run(self.length, after, dtype, self.device)
        self.tail = ExactKV(torch.cat([self.tail.key, key], -2), torch.cat([self.tail.value, value], -2))
        self.tail_slots = torch.cat([self.tail_slots, new.expand(*key.shape[:2], -1)], dim=-1)
        if self.policy.sums_attention:
            self.tail_mass = torch.cat([self.tail_mass, self.tail_mass.new_zeros(key.shape[:3])], dim=-1)
        self.length = after

    def _widen_slots(self, dtype: torch.dtype) -> None:
        self.sink_slots, self.tail_slots = (stored(places(x), dtype) for x in (self.sink_slots, self.tail_slots))
        self.kept = tuple(kept.with_slots(dtype) for kept in self.kept)

    def _kept_handle(self, queries: int) -> KeptKV:
        return KeptKV(
            self._readable(),
            self.sinks,
            self.tail,
            self.sinks.tokens + self.tail.tokens,
            self.page_tokens,
            0,
            torch.zeros(queries, dtype=torch.int64, device=self.device),
            self._query_turn(),
            self._output_turn(),
            None if self.tail.tokens == self.length else torch.cat([self.sink_slots, self.tail_slots], dim=-1),
            observe=self._observe,
        )

    def _readable(self) -> tuple[HeadPages, ...]:
        if not any(kept.layout.key.fmt.pre_rope for kept in self.kept):
            return tuple(kept.shared() for kept in self.kept)
        (decoded,) = super()._readable()
        counts = self._by_head([kept.counts for kept in self.kept]).to(self.device, non_blocking=True)
        slots = self._by_head([kept.padded_slots(self.num_pages) for kept in self.kept]).clamp_min(0)
        extents = torch.stack([torch.zeros_like(counts), counts], dim=-1)
        return (replace(decoded, kept=KeptRecords(extents, stored(slots, self.tail_slots.dtype))),)

    def _slots(self) -> torch.Tensor:
        """Places of sinks, pages and tail, int64 ``[batch, kv_heads, tokens]``; -1 for nothing."""
        parts = [places(self.sink_slots), places(self.tail_slots)]
        if self.num_pages:
            packed = [kept.padded_slots(self.num_pages).flatten(2) for kept in self.kept]
            parts.insert(1, self._by_head(packed))
        return joined(parts, dim=-1)

    def _by_head(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Tensors ``[batch, heads of a layout, ...]`` as one, in the order of the heads."""
        return by_head(parts, [kept.heads for kept in self.kept])

    def _slots_of(self, group: HeadPages, first: int) -> torch.Tensor:
        kept = next(kept for kept in self.kept if kept.heads == group.heads)
        return kept.padded_slots(self.num_pages).flatten(2).clamp_min(0)

    # -- what attention shows -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _observe(
        self,
        query: torch.Tensor,
        *,
        scaling: float,
        mask: torch.Tensor | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        """Take note of a pass that attention has read, and let tokens go where the policy asks for it."""
        self.is_unread = False
        real, reading = real_places(mask), Reading(scaling, softcap, sink_logits)
        is_prompt = query.shape[2] > 1 or self.prompt_end > 0
        if self.policy.sums_attention:
            self._add_mass(query, real, reading)
        if is_prompt:
            self.queries = self._newest_queries(query)
        if self.length < self.prompt_end:
            return
        self._fill_sinks(real)
        if is_prompt:
            self._end_prompt(real, reading)
        else:
            self._pack()
            self._keep_ceiling(query, real, reading)

    def _newest_queries(self, query: torch.Tensor) -> torch.Tensor:
        known = query if self.queries is None else torch.cat([self.queries, query], dim=2)
        return known[:, :, max(0, known.shape[2] - self.policy.num_queries) :].clone()

    def _seen(self, real: torch.Tensor | None, reading: Reading, queries: torch.Tensor) -> Seen:
        slots, all_real = self._slots(), real is None and self._is_even()
        mass = self._mass() if self.policy.sums_attention else None
        is_real = _is_real(slots, real)
        return Seen(slots, is_real, self.length, queries, reading, self._states, mass, all_real=all_real)

    def _is_even(self) -> bool:
        """Whether every head holds as many pages."""
        return all(kept.holds(self.num_pages) for kept in self.kept)

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sinks, pages and tail, as the model made them."""
        parts = [self.sinks, self.tail]
        if self.num_pages:
            parts.insert(1, ExactKV(*self._unpacked(self.pages)))
        return self._restored(*(joined([getattr(x, side) for x in parts], dim=-2) for side in SIDES))

    def _mass(self) -> torch.Tensor:
        """fp64 ``[batch, kv_heads, tokens]``; sinks have none, tokens of a page equal parts."""
        packed = self._by_head([kept.padded_mass(self.num_pages) for kept in self.kept]) / self.page_tokens
        packed = packed.repeat_interleave(self.page_tokens, dim=-1)
        return torch.cat([packed.new_zeros(self.sink_slots.shape), packed, self.tail_mass], dim=-1)

    def _add_mass(self, query: torch.Tensor, real: torch.Tensor | None, reading: Reading) -> None:
        seen = self._seen(real, reading, query)
        new = seen.received()[..., self.sinks.tokens :]
        packed, tail = new.split([self.num_pages * self.page_tokens, self.tail.tokens], dim=-1)
        self.tail_mass = self.tail_mass + tail
        pages = packed.unflatten(-1, (self.num_pages, self.page_tokens)).sum(-1)
        self.kept = tuple(kept.with_mass(of_heads(pages, kept.heads)) for kept in self.kept)

    # -- what stays ---------------------------------------------------------------------------------------------------

    def _resident(self) -> int:
        """Tokens held per KV head, the mean over the heads."""
        return self._held(self._heads() * self.tail.tokens)

    def _heads(self) -> int:
        """KV heads of all sequences."""
        return self.batch_size * self.model.num_kv_heads

    def _held(self, exact: int) -> int:
        """Tokens held per KV head, if all heads together held ``exact`` tokens besides sinks and pages."""
        packed = sum(len(kept.data) for kept in self.kept) * self.page_tokens
        return self.sinks.tokens + (packed + exact) // self._heads()

    def _fill_sinks(self, real: torch.Tensor | None) -> None:
        """Move the first real tokens of the tail to the sinks that are missing."""
        missing = min(self.entry.window.sinks - self.sinks.tokens, self.tail.tokens)
        if missing <= 0:
            return
        (key, value, slots, *_), rest = self._split_tail(missing, real)
        self.sinks = ExactKV(torch.cat([self.sinks.key, key], dim=-2), torch.cat([self.sinks.value, value], dim=-2))
        self.sink_slots = torch.cat([self.sink_slots, slots], dim=-1)
        self._set_tail(*rest)

    def _split_tail(self, count: int, real: torch.Tensor | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The ``count`` first real tokens of the tail, and copies of the others; both as `_tail_tensors`."""
        tensors, sizes = self._tail_tensors(), (count, self.tail.tokens - count)
        if real is None:
            return [x[:, :, :count] for x in tensors], [x[:, :, count:].clone() for x in tensors]
        is_first = best(_is_real(places(self.tail_slots), real).float(), count)
        first, others = (
            named(mask, self._heads() * size).view(*mask.shape[:2], size)
            for mask, size in zip((is_first, ~is_first), sizes, strict=True)
        )
        return [taken(x, first) for x in tensors], [taken(x, others) for x in tensors]

    def _tail_tensors(self) -> list[torch.Tensor]:
        """Keys, values, places and (if anybody asks) mass of the tail, ``[batch, kv_heads, tokens, ...]`` each."""
        mass = [self.tail_mass] if self.policy.sums_attention else []
        return [self.tail.key, self.tail.value, self.tail_slots, *mass]

    def _set_tail(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, *mass: torch.Tensor) -> None:
        """Have another tail; see `_tail_tensors`."""
        self.tail, self.tail_slots = ExactKV(key, value), slots
        (self.tail_mass,) = mass or (self.tail_mass,)

    def _end_prompt(self, real: torch.Tensor | None, reading: Reading) -> None:
        limit = self.room.limit(self.length)
        assert self.queries is not None
        if self._resident() > limit:
            self._evict(limit, real, self._seen(real, reading, self.queries))
        else:
            self._pack()
        self.prompt_end, self.queries = 0, None

    def _evict(self, limit: int, real: torch.Tensor | None, seen: Seen) -> None:
        """Keep as many tokens as ``limit`` allows, and pack the pages they fill."""
        pages, tail, stays = self._scores(seen, real, self.room.newest(limit))
        base, units = self.room.split(self.tail.tokens, limit, stays)
        chosen = self._chosen(pages, tail, base, units)
        of_pages, of_tail = self._counted(chosen, pages, limit)
        if self.num_pages:
            self.kept = tuple(
                kept.only(of_heads(chosen.pages, kept.heads), [of_pages[n] for n in self._numbers_of(kept)])
                for kept in self.kept
            )
            self._count_pages()
        self._pack_chosen(named(chosen.tail, sum(of_tail)), of_tail)

    def _chosen(self, pages: torch.Tensor, tail: torch.Tensor, base: int, units: int) -> Chosen:
        """`choose` for every head, or among the heads of a layout, whose pages take equally many bytes."""
        if not self.policy.is_pooled:
            return choose(pages, tail, base, units, self.page_tokens, is_pooled=False)
        groups = [(of_heads(pages, kept.heads), of_heads(tail, kept.heads)) for kept in self.kept]
        parts = [choose(*group, base, units, self.page_tokens, is_pooled=True) for group in groups]
        stays, of_tail = (self._by_head([getattr(part, name) for part in parts]) for name in ("pages", "tail"))
        return Chosen(stays, of_tail, None)

    def _counted(self, chosen: Chosen, pages: torch.Tensor, limit: int) -> tuple[list[int], list[int]]:
        """How many pages and exact tokens stay of each head of each sequence.

        The host waits for the device here, once, unless it knows: heads that do not compete and have no pages yet.
        """
        if chosen.each is not None:
            return [0] * self._heads(), [chosen.each] * self._heads()
        gone = (pages == _PROTECTED) & ~chosen.pages
        counts = torch.stack([x.sum(-1).flatten() for x in (chosen.pages, chosen.tail, gone)])
        of_pages, of_tail, lost = counts.tolist()
        if any(lost):
            raise _too_much_is_kept(limit)
        return of_pages, of_tail

    def _numbers_of(self, kept: KeptPages) -> list[int]:
        """Which of the heads of all sequences have a layout."""
        return [row * self.model.num_kv_heads + head for row in range(self.batch_size) for head in kept.heads]

    def _scores(self, seen: Seen, real: torch.Tensor | None, newest: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Scores of pages (NaN: none) and of exact tokens, and how many exact tokens never leave."""
        scores = self.policy.scores(seen).double().nan_to_num(nan=_PADDING, posinf=-_PADDING, neginf=_PADDING)
        if not seen.all_real:
            scores = scores.masked_fill(~seen.is_real, _PADDING)
        scores = scores.masked_fill(self._never_leaves(seen.slots, real, newest), _PROTECTED)
        sizes = [self.sinks.tokens, self.num_pages * self.page_tokens, self.tail.tokens]
        _, packed, tail = scores.split(sizes, dim=-1)
        pages = packed.unflatten(-1, (self.num_pages, self.page_tokens)).sum(-1)
        if not self._is_even():
            _, slots, _ = seen.slots.split(sizes, dim=-1)
            pages = pages.masked_fill(slots[..., :: self.page_tokens] < 0, torch.nan)
        kept = min(newest, self.tail.tokens)
        if self.room.protect:
            kept = int((tail == _PROTECTED).sum(-1).max())
        return pages, tail, kept

    def _never_leaves(self, slots: torch.Tensor, real: torch.Tensor | None, newest: int) -> torch.Tensor:
        """Which tokens are among the newest or in a protected span: bool, shaped like ``slots``."""
        stays = slots >= self.length - newest
        if self.room.protect:
            first = 0 if real is None else real.int().argmax(-1)[:, None, None]
            for start, end in self.room.protect:
                stays |= (slots >= first + start) & (slots < first + end)
        return stays

    def _pack(self) -> None:
        """Encode the pages that are full and out of the exact window."""
        if self.tail.tokens - self.room.exact(self._resident()) < self.page_tokens:
            return
        counts = [self.tail.tokens] * self._heads()
        self._pack_chosen(torch.arange(sum(counts), device=self.device), counts)

    def _pack_chosen(self, at: torch.Tensor, counts: list[int]) -> None:
        """Keep of the tail what ``at`` numbers (see `taken`), head after head, and pack what is not exact.

        Args:
            at: int64 ``[sum of counts]``.
            counts: How many of each head of each sequence. They differ by whole pages, so that the tails that are left
                are equally long.
        """
        exact, size = self.room.exact(self._held(sum(counts))), self.page_tokens
        pages = [max(0, count - exact) // size for count in counts]
        left = counts[0] - pages[0] * size
        parts = at.split([n for page in pages for n in (page * size, left)])
        if any(pages):
            self.kept = tuple(kept.joined(self._encoded_pages(kept, parts[::2], pages)) for kept in self.kept)
            self._count_pages()
        if left < self.tail.tokens:
            stays = torch.cat(parts[1::2]).view(*self.tail_slots.shape[:2], left)
            self._set_tail(*(taken(x, stays) for x in self._tail_tensors()))

    def _encoded_pages(self, kept: KeptPages, parts: Sequence[torch.Tensor], pages: list[int]) -> KeptPages:
        """The pages of a layout that the tail's tokens ``parts`` fill, ``pages`` of each head of each sequence."""
        own = self._numbers_of(kept)
        at = torch.cat([parts[n] for n in own]).view(-1, self.page_tokens)
        slots, data = taken(self.tail_slots, at), kept.data[:0]
        if len(at):
            in_row = at.view(1, 1, -1)
            key, value = taken(self.tail.key, in_row), taken(self.tail.value, in_row)
            of_keys = places(slots).flatten() if kept.layout.key.fmt.pre_rope else 0
            data = self._encoded(key, value, kept.layout, of_keys).flatten(0, 2)
        mass = None if kept.mass is None else taken(self.tail_mass, at).sum(-1)
        counts = torch.tensor([pages[n] for n in own], dtype=torch.int32).view(kept.counts.shape)
        return KeptPages(kept.heads, kept.layout, data, slots, mass, counts)

    def _keep_ceiling(self, query: torch.Tensor, real: torch.Tensor | None, reading: Reading) -> None:
        """Let the page of the least score go, as long as more tokens are held than the policy's ceiling allows."""
        if not self.policy.evicts_while_decoding:
            return
        limit = self.room.limit(self.length)
        while self._resident() > limit:
            seen = self._seen(real, reading, query)
            pages, _, _ = self._scores(seen, real, self.room.newest(limit))
            least = pages.nan_to_num(nan=_PROTECTED, posinf=_PROTECTED).min(dim=-1)
            if bool((least.values == _PROTECTED).any()):
                raise _too_much_is_kept(limit)
            stays = (~pages.isnan()).scatter(-1, least.indices[..., None], False)
            self.kept = tuple(
                kept.only(of_heads(stays, kept.heads), [size - 1 for size in kept.sizes]) for kept in self.kept
            )
            self._count_pages()

    def _count_pages(self) -> None:
        self.num_pages = max(kept.most for kept in self.kept)

    # -- going back ---------------------------------------------------------------------------------------------------

    def mark(self, new: int = 0) -> Any:
        """What `roll_back` returns to; tensors are replaced, never written to.

        If a pass of ``new`` tokens leaves the prompt unfinished, the number of exact tokens will do: a long prompt is
        not to be held twice.
        """
        fields = vars(self).copy()
        if self.is_initialized and self.length + new < self.prompt_end:
            fields["tail"] = self.tail.tokens
        return fields

    def roll_back(self, mark: Any) -> None:
        """Undo every update since ``mark``, exactly."""
        fields, tail = dict(mark), mark.get("tail")
        if isinstance(tail, int):
            fields["tail"] = ExactKV(self.tail.key[:, :, :tail].clone(), self.tail.value[:, :, :tail].clone())
        vars(self).clear()
        vars(self).update(fields)

    def _remove(self, remove: int) -> None:
        raise CacheError(
            f"a cache that evicts cannot crop {remove} tokens, since others left for them: use a plan without evict."
        )

    def activate_past_recording(self) -> None:
        """Refuse.

        Raises:
            CacheError: Always: tokens that may be rejected would make others leave.
        """
        raise CacheError("a cache that evicts cannot decode with an assistant: use a plan without evict.")

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        rows = change(torch.arange(self.batch_size, device=self.tail.key.device))
        self.kept = tuple(kept.of_sequences(rows) for kept in self.kept)
        self.sinks = ExactKV(change(self.sinks.key), change(self.sinks.value))
        self.tail = ExactKV(change(self.tail.key), change(self.tail.value))
        self.sink_slots, self.tail_slots = change(self.sink_slots), change(self.tail_slots)
        self.tail_mass = change(self.tail_mass)
        self.queries = None if self.queries is None else change(self.queries)

    # -- storage ------------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything resident, by name."""
        if not self.is_initialized:
            return
        for n, kept in enumerate(self.kept):
            yield from ((f"pages.{n}", kept.data), (f"pages.{n}.slots", kept.slots), (f"pages.{n}.counts", kept.counts))
            if kept.mass is not None:
                yield f"pages.{n}.mass", kept.mass
        for n, points in enumerate(self.codebooks):
            yield f"codebooks.{n}", points
        for name, exact, slots in (("sinks", self.sinks, self.sink_slots), ("tail", self.tail, self.tail_slots)):
            yield from ((f"{name}.key", exact.key), (f"{name}.value", exact.value), (f"{name}.slots", slots))
        if self.policy.sums_attention:
            yield "tail.mass", self.tail_mass
        if self.queries is not None:
            yield "queries", self.queries
        yield from self._rotations()

    def restore(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """See `LoomLayer.restore`."""
        tail = tensors.get("tail.key", torch.empty(0))
        of_model = tail.shape[1::2] == (self.model.num_kv_heads, self.model.head_dim)
        if not of_model or not tail.is_floating_point():
            raise CacheError(NOT_THIS_PLANS)
        self._clear()
        self.lazy_initialization(tail[:, :, :0], tail[:, :, :0])
        if self._expected(tensors, tail, length) != {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}:
            raise CacheError(NOT_THIS_PLANS)
        self.length = length
        self.sinks = ExactKV(tensors["sinks.key"], tensors["sinks.value"])
        self.tail = ExactKV(tensors["tail.key"], tensors["tail.value"])
        self.sink_slots, self.tail_slots = tensors["sinks.slots"], tensors["tail.slots"]
        self.tail_mass = tensors.get("tail.mass", self.tail_mass)
        self.kept = tuple(
            replace(
                kept,
                data=tensors[f"pages.{n}"],
                slots=tensors[f"pages.{n}.slots"],
                mass=tensors.get(f"pages.{n}.mass"),
                counts=tensors[f"pages.{n}.counts"].cpu(),
            )
            for n, kept in enumerate(self.kept)
        )
        self._count_pages()
        if self._resident() > length:
            raise CacheError(NOT_THIS_PLANS)

    def _expected(
        self, tensors: dict[str, torch.Tensor], tail: torch.Tensor, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of saved tensors, as far as the tail and the numbers of pages leave them open."""
        heads, expected = tuple(tail.shape[:2]), {}
        for part, tokens in (("sinks", min(length, self.entry.window.sinks)), ("tail", tail.shape[2])):
            for side in SIDES:
                expected[f"{part}.{side}"] = ((*heads, tokens, tail.shape[3]), tail.dtype)
            expected[f"{part}.slots"] = ((*heads, tokens), slot_dtype(length))
        if self.policy.sums_attention:
            expected["tail.mass"] = ((*heads, tail.shape[2]), torch.float64)
        for n, kept in enumerate(self.kept):
            name, of_group = f"pages.{n}", (heads[0], len(kept.heads))
            records = int(tensors.get(f"{name}.counts", torch.zeros(1)).clamp_min(0).sum())
            expected[name] = ((records, kept.layout.nbytes), torch.uint8)
            expected[f"{name}.slots"] = ((records, self.page_tokens), slot_dtype(length))
            expected[f"{name}.counts"] = (of_group, torch.int32)
            if self.policy.sums_attention:
                expected[f"{name}.mass"] = ((records,), torch.float64)
        for n, points in enumerate(self.codebooks):
            expected[f"codebooks.{n}"] = (tuple(points.shape), points.dtype)
        return expected | {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._rotations()}


def _is_real(slots: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are neither padding nor nothing, likewise ``[batch, kv_heads, tokens]``; see `real_places`."""
    if real is None:
        return slots >= 0
    by_place = real.expand(len(slots), -1)[:, None].expand(-1, slots.shape[1], -1)
    return by_place.gather(-1, slots.clamp_min(0)) & (slots >= 0)


def _too_much_is_kept(limit: int) -> CacheError:
    return CacheError(
        f"a limit of {limit} tokens per KV head cannot hold the pages whose tokens are protected or among the newest: "
        "give evict a larger budget, or protect less."
    )
