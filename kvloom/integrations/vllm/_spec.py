"""What vLLM's scheduler is to know of the blocks: their bytes, the spare ones, and where shared prefixes end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class KvloomSpec(FullAttentionSpec):  # type: ignore[misc]
    """A layer's cache in vLLM's terms.

    Attributes:
        spare_blocks: Blocks of a sequence besides those of its tokens.
        sinks: First tokens of a sequence, exact.
        is_graph_safe: Whether a step can be a CUDA graph, see `kvloom.kernels.Backend`.
    """

    spare_blocks: int
    sinks: int
    is_graph_safe: bool

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest sequence."""
        return int(super().max_memory_usage_bytes(vllm_config) + self.spare_blocks * self.page_size_bytes)

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Blocks of a sequence of ``max_len`` tokens."""
        return int(super().max_num_blocks_per_req(vllm_config, max_len) + self.spare_blocks)

    @classmethod
    def merge(cls, specs: Sequence[KvloomSpec]) -> KvloomSpec:
        """The one spec of layers that have the same.

        Raises:
            AssertionError: They differ; vLLM asks so whether they do.
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers differ in bytes")
        return specs[0]


class KvloomManager(FullAttentionManager):  # type: ignore[misc]
    """Gives sequences their spare blocks, and ends shared prefixes where a page ends."""

    def __init__(self, kv_cache_spec: KvloomSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self._sinks = kv_cache_spec.sinks
        self._spare = kv_cache_spec.spare_blocks * self.block_size

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that ``num_tokens`` tokens still need."""
        return int(super().get_num_blocks_to_allocate(request_id, num_tokens + self._spare, *args, **kwargs))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Allocate them."""
        return list(super().allocate_new_blocks(request_id, num_tokens + self._spare, num_tokens_main_model))

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let other requests find the full blocks among those of ``num_tokens`` tokens.

        With sinks they are found when they have been written: the last one is copied before a pass begins.
        """
        if self._sinks:
            num_tokens = min(num_tokens, request.num_computed_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, kv_cache_spec: KvloomSpec, **kwargs: Any) -> tuple[Any, int]:
        """Blocks of the longest prefix that is held, and its tokens, up to the last page that ends within it."""
        blocks, tokens = super().find_longest_cache_hit(*args, kv_cache_spec=kv_cache_spec, **kwargs)
        size, sinks = kv_cache_spec.block_size, kv_cache_spec.sinks
        tokens = (tokens - sinks) // size * size + sinks
        if tokens <= sinks:
            return tuple([] for _ in blocks), 0
        return blocks, tokens


def register() -> None:
    """Make the spec and its manager known to vLLM."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(KvloomSpec, KvloomManager)
