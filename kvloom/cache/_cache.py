"""`LoomCache`: transformers' growing cache with its plain layers replaced by packed ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvloom import codecs, kernels
from kvloom.cache import _file
from kvloom.cache._attention import reads_pages
from kvloom.cache._evicting import EvictingLayer
from kvloom.cache._fixed import FixedLayer
from kvloom.cache._flags import Flags
from kvloom.cache._kept_kv import KeptKV
from kvloom.cache._layer import LoomLayer, NonFinite
from kvloom.cache._rope import rope_of
from kvloom.cache._shard import shard_of
from kvloom.cache._sliding import SlidingLayer
from kvloom.cache._static import StaticLoomLayer
from kvloom.cache._static_evicting import StaticEvictingLayer
from kvloom.cache._step_layer import StepLayer
from kvloom.errors import CacheError, PlanError
from kvloom.plan import Fingerprint, Plan, format_layers


class LoomCache(DynamicCache):
    """Packed cache for ``model.generate(..., past_key_values=LoomCache(plan, model))``.

    Full-attention layers are packed by the plan, and evict where it says so (`EvictingLayer`); sliding-window, linear
    and shared layers keep transformers' own (with ``max_tokens``, sliding windows are rings: `SlidingLayer`). Of a
    model that transformers has sharded (tensor parallelism) each process holds the pages of its own KV heads: ``plan``
    is then that part of the plan (`kvloom.Plan.shard`), and `nbytes` what this process holds.

    Args:
        plan: What each layer stores.
        model: The transformers model (or its config) the cache is for.
        nonfinite: What packing does with NaN, infinities and magnitudes above 65504: ``error`` (default) or
            ``clamp``.
        max_tokens: Room for so many tokens of each sequence, allocated at the first pass, in place of a cache that
            grows. Layers that evict allocate when the first prompt ends: for what is kept and for what is to come. With
            the CUDA kernels (fp16 or bf16, and `kvloom.enable`) ``generate`` then compiles decoding and replays it as
            CUDA graphs.

    Raises:
        ModelError: The model is not the plan's, cannot be packed, has no rotary embedding that keys could be packed
            before (pre_rope), or is sharded over a number of processes that its KV heads cannot be split over.
        PlanError: The plan lacks a codebook, its tensors cannot be read, it evicts under ``prefill="quantized"``, or a
            process of a sharded model cannot follow it (`kvloom.Plan.shard`).
        CacheError: ``max_tokens`` is not positive, or does not go with ``nonfinite`` or with the plan.
        MissingExtraError: A codec of the plan needs a package that is not installed.
    """

    def __init__(
        self, plan: Plan, model: Any, *, nonfinite: NonFinite = "error", max_tokens: int | None = None
    ) -> None:
        config = getattr(model, "config", model)
        fingerprint = Fingerprint.of(model)
        plan.model.check(fingerprint)
        self.shard = shard_of(model)
        plan = plan.shard(*self.shard)
        if max_tokens is not None and max_tokens < 1:
            raise CacheError(
                f"max_tokens is {max_tokens}: give the number of tokens to make room for, or leave it out."
            )
        plan.check_codebooks()
        if max_tokens is not None and plan.pre_rope_layers:
            raise CacheError(
                "a cache of fixed size cannot pack keys before RoPE: leave out max_tokens, or pre_rope in the plan's "
                f"layers {format_layers(list(plan.pre_rope_layers))}."
            )
        evicting = [str(entry.layers) for entry in plan.layers if entry.evict is not None]
        if evicting and plan.prefill != "exact":  # a changed copy of a plan is not validated
            raise PlanError(f'layers {evicting[0]}: evict chooses among tokens read exactly: set prefill to "exact".')
        for name in plan.codecs:
            codecs.get(name).prepare()
        self.rope = rope_of(model, plan.pre_rope_layers) if plan.pre_rope_layers else None
        super().__init__(config=config)
        self.plan = plan
        self.max_tokens = max_tokens
        make: Callable[..., LoomLayer] = LoomLayer
        make_evicting: Callable[..., LoomLayer] = EvictingLayer
        if max_tokens is not None:
            fixed: dict[str, Any] = {"max_tokens": max_tokens, "expected": _expected(model)}
            make, make_evicting = partial(StaticLoomLayer, **fixed), partial(StaticEvictingLayer, **fixed)
        self._flags = Flags()
        options: dict[str, Any] = {
            "prefill": plan.prefill,
            "nonfinite": nonfinite,
            "flags": self._flags,
            "rope": self.rope,
        }
        is_enabled, matrices = _AttentionName(config).is_loom, plan.rotations()
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                room = plan.room(i)
                make_it = partial(make_evicting, room=room) if room else make
                self.layers[i] = make_it(
                    plan.spec(i), plan.model, is_enabled=is_enabled, matrices=matrices.get(i, {}), **options
                )
            elif type(layer) is DynamicSlidingWindowLayer and max_tokens is not None:
                self.layers[i] = SlidingLayer(max_tokens, layer.sliding_window, is_enabled)
        self._last_packed = max(self.packed_layers)
        self._marks: dict[int, Any] = {}
        self._has_warned = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Append one layer's tokens of a pass; see `LoomLayer.update`.

        If it fails, the pass is undone in every attention layer it has reached: the cache stays as it was before.
        """
        if self.max_tokens is not None and key_states.shape[-2] == 1 and self._cannot_fail(layer_idx):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self._marks:
            self._marks.clear()  # an earlier pass ended before the last layer
        if layer_idx <= self._last_packed:
            self._marks[layer_idx] = _mark(self.layers[layer_idx], key_states.shape[-2])
        try:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if isinstance(states[0], KeptKV):
                kept = replace(states[0], observe=partial(self._observe, states[0].observe, layer_idx))
                return kept, kept
            self._end_layer(layer_idx)
        except Exception:
            self._undo_pass()
            raise
        if isinstance(self.layers[layer_idx], LoomLayer) and isinstance(states[0], torch.Tensor):
            self._warn_dense()
        return states

    def _observe(self, observe: Callable[..., None], layer_idx: int, query: torch.Tensor, **options: Any) -> None:
        """Let a layer that evicts take note of a pass that has been read; see `update` for what fails."""
        try:
            observe(query, **options)
            self._end_layer(layer_idx)
        except Exception:
            self._undo_pass()
            raise

    def _end_layer(self, layer_idx: int) -> None:
        if layer_idx == self._last_packed:
            self._flags.check()
            self._marks.clear()

    def _undo_pass(self) -> None:
        self._flags.clear()
        for i, mark in self._marks.items():
            _roll_back(self.layers[i], mark)
        self._marks.clear()

    def expect_prompt(self, tokens: int) -> None:
        """Say that the next ``tokens`` tokens of every sequence are one prompt, in however many passes they come.

        Layers that evict (`EvictingLayer`) then choose among all of them when the last one has been read, and keep what
        they would have kept had they come in one pass. Without it every pass of several tokens is a prompt.

        Raises:
            CacheError: The number is not positive.
        """
        if tokens < 1:
            raise CacheError(f"a prompt has at least one token, not {tokens}.")
        for layer in self.packed_layers.values():
            if isinstance(layer, EvictingLayer):
                layer.expect_prompt(tokens)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the mask of a pass of so many tokens, if there is room for them (see `check`)."""
        if self.max_tokens is not None and not torch.compiler.is_compiling():
            self.check(room_for=query_length)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def check(self, *, room_for: int = 0) -> None:
        """Wait for the device, and raise what decoding with ``max_tokens`` could not raise when it happened.

        Models and ``generate`` call it before every pass that is not compiled, since they ask for the size of the mask.

        Args:
            room_for: Tokens about to come.

        Raises:
            CacheError: NaN, infinity or a magnitude above 65504 was packed, or there is no room for the tokens.
        """
        layer = self.layers[self._last_packed]
        if isinstance(layer, FixedLayer) and not _is_capturing():
            layer.check(room_for=room_for)

    @property
    def is_graph_safe(self) -> bool:
        """Whether every step through a cache of fixed size launches the same, and never waits for the device."""
        return all(isinstance(layer, StepLayer) and layer.is_graph_safe for layer in self.layers)

    def waits_at(self, tokens: int) -> bool:
        """Whether the step that follows ``tokens`` tokens launches other things than the last one, or waits.

        Where no kernel packs pages by itself, that is every step that does; `kvloom.kernels.between_pages` covers the
        others.
        """
        if self.is_graph_safe:
            return False
        layers = [layer for layer in self.layers if isinstance(layer, StepLayer) and layer.is_graph_safe_between_pages]
        return len(layers) < len(self.layers) or any(layer.changes_more(tokens) for layer in layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens; see `LoomLayer.crop` and `SlidingLayer.check_crop`."""
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self._flags.check()

    def reset(self) -> None:
        """Forget every token, and what was wrong with them."""
        super().reset()  # type: ignore[no-untyped-call]
        self._flags.clear()

    def _cannot_fail(self, layer_idx: int) -> bool:
        """Whether a pass of one token through a layer of fixed size raises nothing."""
        layer = self.layers[layer_idx]
        is_prompt = isinstance(layer, StepLayer) and not layer.takes_steps
        if torch.compiler.is_compiling():
            return True
        return (bool(layer.is_compileable) or kernels.is_between_pages()) and not is_prompt

    def _warn_dense(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the model's attention cannot read packed pages, so every step unpacks the whole cache: memory is "
                "saved, speed is not (kvloom.enable(model) gives both where the model supports it).",
                stacklevel=3,
            )

    @property
    def packed_layers(self) -> dict[int, LoomLayer]:
        """The packed layers by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, LoomLayer)}

    def nbytes(self) -> int:
        """Live bytes of the packed layers: the storage of every tensor they hold, in this process."""
        return sum(layer.nbytes() for layer in self.packed_layers.values())

    def true_bits(self) -> float:
        """8 x live bytes / cached elements of the packed layers.

        Raises:
            CacheError: The cache is empty.
        """
        model, tokens = self.plan.model, int(self.get_seq_length())
        batch = next(iter(self.packed_layers.values())).batch_size
        if tokens == 0:
            raise CacheError("an empty cache has no bits: true_bits needs at least one token.")
        elements = 2 * len(self.packed_layers) * batch * model.num_kv_heads * tokens * model.head_dim
        return 8 * self.nbytes() / elements

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, with its plan.

        Raises:
            CacheError: The cache is empty, or holds layers that cannot be written.
        """
        _file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, plan: Plan, model: Any, **options: Any) -> LoomCache:
        """Read a cache written by `save`, onto the model's device.

        Args:
            path: The file.
            plan: The plan it was written under.
            model: The model.
            **options: Those of the class.

        Raises:
            CacheError: The file is missing, cut short, foreign, or written under another plan or for another model.
        """
        cache = cls(plan, model, **options)
        _file.restore(cache, Path(path), getattr(model, "device", "cpu"))
        return cache


def _mark(layer: Any, new: int) -> Any:
    """What `_roll_back` needs to undo a pass of ``new`` tokens; transformers' growing layers replace their tensors."""
    if isinstance(layer, EvictingLayer):
        return layer.mark(new)
    return layer.mark() if isinstance(layer, LoomLayer | SlidingLayer) else vars(layer).copy()


def _roll_back(layer: Any, mark: Any) -> None:
    if isinstance(layer, LoomLayer | SlidingLayer):
        layer.roll_back(mark)
    else:
        vars(layer).update(mark)


def _expected(model: Any) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of the states of a model; None if only its config is known."""
    device, dtype = getattr(model, "device", None), getattr(model, "dtype", None)
    return (device, dtype) if isinstance(device, torch.device) and isinstance(dtype, torch.dtype) else None


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _AttentionName:
    """Knows the attention a config names at this moment; survives deepcopy as a reference to the same config."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def is_loom(self) -> bool:
        text = self.config.get_text_config(decoder=True)
        return reads_pages(getattr(text, "_attn_implementation", None))

    def __deepcopy__(self, memo: dict[int, Any]) -> _AttentionName:
        return self
