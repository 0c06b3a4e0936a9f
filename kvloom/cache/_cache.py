"""`LoomCache`: transformers' growing cache with its plain layers replaced by packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvloom.cache import _file
from kvloom.cache._attention import ATTENTION
from kvloom.cache._layer import LoomLayer, NonFinite
from kvloom.errors import PlanError
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
    """

    def __init__(self, plan: Plan, model: Any, *, nonfinite: NonFinite = "error") -> None:
        config = getattr(model, "config", model)
        fingerprint = Fingerprint.of(model)
        plan.model.check(fingerprint)
        evicting = [str(entry.layers) for entry in plan.layers if entry.evict is not None]
        if evicting:
            raise PlanError(f"layers {evicting[0]}: evict is not supported yet; remove the entry from the plan.")
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

    @property
    def packed_layers(self) -> dict[int, LoomLayer]:
        """The packed layers by index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, LoomLayer)}

    def nbytes(self) -> int:
        """Live bytes of the packed layers: the storage of every tensor they hold."""
        return sum(layer.nbytes() for layer in self.packed_layers.values())

    def true_bits(self) -> float:
        """8 x live bytes / cached elements of the packed layers."""
        model, tokens = self.plan.model, self.get_seq_length()
        batch = next(iter(self.packed_layers.values())).batch_size
        if tokens == 0:
            raise PlanError("an empty cache has no bits: true_bits needs at least one token.")
        elements = 2 * len(self.packed_layers) * batch * model.num_kv_heads * tokens * model.head_dim
        return 8 * self.nbytes() / elements

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, with its plan.

        Raises:
            CacheError: The cache is empty, or holds layers that cannot be written.
        """
        _file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, plan: Plan, model: Any) -> LoomCache:
        """Read a cache written by `save`.

        Raises:
            CacheError: The file is missing, cut short, foreign, or written under another plan or for another model.
        """
        cache = cls(plan, model)
        _file.restore(cache, Path(path))
        return cache


class _AttentionName:
    """Knows the attention a config names at this moment; survives deepcopy as a reference to the same config."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def is_loom(self) -> bool:
        text = self.config.get_text_config(decoder=True)
        return bool(getattr(text, "_attn_implementation", None) == ATTENTION)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AttentionName:
        return self
