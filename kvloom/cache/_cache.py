"""`LoomCache`: transformers' growing cache with its plain layers replaced by packed ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvloom import codecs
from kvloom.cache import _file
from kvloom.cache._attention import ATTENTION
from kvloom.cache._layer import LoomLayer, NonFinite
from kvloom.errors import CacheError, PlanError
from kvloom.pages import PagedKV
from kvloom.plan import Fingerprint, Plan


class LoomCache(DynamicCache):
    """Packed cache for ``model.generate(..., past_key_values=LoomCache(plan, model))``.

    Full-attention layers are packed by the plan; sliding-window, linear and shared layers keep transformers' own.

    Args:
        plan: What each layer stores.
        model: The transformers model (or its config) the cache is for.
        nonfinite: What packing does with NaN, infinities and magnitudes above 65504: ``error`` (default) or
            ``clamp``.

    Raises:
        ModelError: The model is not the plan's, or cannot be packed.
        PlanError: The plan asks for what no code does yet (an evict entry).
        MissingExtraError: A codec of the plan needs a package that is not installed.
    """

    def __init__(self, plan: Plan, model: Any, *, nonfinite: NonFinite = "error") -> None:
        config = getattr(model, "config", model)
        fingerprint = Fingerprint.of(model)
        plan.model.check(fingerprint)
        evicting = [str(entry.layers) for entry in plan.layers if entry.evict is not None]
        if evicting:
            raise PlanError(f"layers {evicting[0]}: evict is not supported yet; remove the entry from the plan.")
        for name in plan.codecs:
            codecs.get(name).prepare()
        super().__init__(config=config)
        self.plan = plan
        attention = _AttentionName(config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = LoomLayer(
                    plan.spec(i),
                    plan.model,
                    prefill=plan.prefill,
                    nonfinite=nonfinite,
                    is_enabled=attention.is_loom,
                )
        self._last_packed = max(self.packed_layers)
        self._marks: dict[int, Any] = {}
        self._has_warned = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Append one layer's tokens of a pass; see `LoomLayer.update`.

        If it fails, the pass is undone in every attention layer it has reached: the cache stays as it was before.
        """
        if layer_idx in self._marks:
            self._marks.clear()  # an earlier pass ended before the last layer
        if layer_idx <= self._last_packed:
            self._marks[layer_idx] = _mark(self.layers[layer_idx])
        try:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            for i, mark in self._marks.items():
                _roll_back(self.layers[i], mark)
            self._marks.clear()
            raise
        if layer_idx == self._last_packed:
            self._marks.clear()
        if isinstance(self.layers[layer_idx], LoomLayer) and not isinstance(states[0], PagedKV):
            self._warn_dense()
        return states

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
        """Live bytes of the packed layers: the storage of every tensor they hold."""
        return sum(layer.nbytes() for layer in self.packed_layers.values())

    def true_bits(self) -> float:
        """8 x live bytes / cached elements of the packed layers.

        Raises:
            CacheError: The cache is empty.
        """
        model, tokens = self.plan.model, self.get_seq_length()
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
    def load(cls, path: str | Path, plan: Plan, model: Any, *, nonfinite: NonFinite = "error") -> LoomCache:
        """Read a cache written by `save`, onto the model's device.

        Raises:
            CacheError: The file is missing, cut short, foreign, or written under another plan or for another model.
        """
        cache = cls(plan, model, nonfinite=nonfinite)
        _file.restore(cache, Path(path), getattr(model, "device", "cpu"))
        return cache


def _mark(layer: Any) -> Any:
    """What `_roll_back` needs; transformers' own attention layers replace their tensors and never write into them."""
    return layer.mark() if isinstance(layer, LoomLayer) else vars(layer).copy()


def _roll_back(layer: Any, mark: Any) -> None:
    if isinstance(layer, LoomLayer):
        layer.roll_back(mark)
    else:
        vars(layer).update(mark)


class _AttentionName:
    """Knows the attention a config names at this moment; survives deepcopy as a reference to the same config."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def is_loom(self) -> bool:
        text = self.config.get_text_config(decoder=True)
        return bool(getattr(text, "_attn_implementation", None) == ATTENTION)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AttentionName:
        return self
