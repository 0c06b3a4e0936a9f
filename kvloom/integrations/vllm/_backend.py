"""vLLM's attention backend of one layer: append to blocks, pack, attend, sequence by sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvloom import kernels
from kvloom.cache import SideRotation, side_rotation, turned
from kvloom.integrations.vllm._layout import BlockLayout
from kvloom.integrations.vllm._sequence import Sequence
from kvloom.integrations.vllm._spec import KvloomSpec
from kvloom.pages import Role
from kvloom.plan import Prefill


@dataclass(frozen=True)
class _Metadata(AttentionMetadata):  # type: ignore[misc]
    """The sequences of a pass.

    Attributes:
        starts: First token of each among the tokens of the pass, then their number.
        lengths: Tokens of each, those of the pass included.
        tables: int64 ``[sequences, blocks]``.
    """

    starts: list[int]
    lengths: list[int]
    tables: torch.Tensor


class _MetadataBuilder(AttentionMetadataBuilder[_Metadata]):  # type: ignore[misc]
    """Takes from vLLM's metadata what sequences are read by."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> _Metadata:
        """Metadata of a pass."""
        return _Metadata(
            common_attn_metadata.query_start_loc_cpu.tolist(),
            common_attn_metadata.seq_lens.tolist(),
            common_attn_metadata.block_table_tensor.long(),
        )


class KvloomBackend(AttentionBackend):  # type: ignore[misc]
    """Base of every layer's own backend class; see `backend_of`."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    layout: ClassVar[BlockLayout]
    spare_blocks: ClassVar[int]

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int]:  # noqa: ARG003 (vLLM's)
        """Tokens in a block."""
        return [cls.layout.page_tokens]

    @staticmethod
    def get_name() -> str:
        """The name vLLM keeps for backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KvloomImpl]:
        """What computes attention."""
        return KvloomImpl

    @staticmethod
    def get_builder_cls() -> type[_MetadataBuilder]:
        """What makes its metadata."""
        return _MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block after block."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: Any) -> KvloomSpec:
        """The layer's blocks: bytes, and one state a page."""
        return KvloomSpec(
            block_size=cls.layout.page_tokens,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=torch.uint8,
            num_head_slots=1,
            state_content_bytes=cls.layout.nbytes,
            tokens_per_state=cls.layout.page_tokens,
            spare_blocks=cls.spare_blocks,
            sinks=cls.layout.sinks,
        )


def backend_of(layer: int, layout: BlockLayout, spare_blocks: int) -> type[KvloomBackend]:
    """The backend class of a layer, by which vLLM learns the layer's bytes."""
    return type(f"KvloomBackend{layer}", (KvloomBackend,), {"layout": layout, "spare_blocks": spare_blocks})


class KvloomImpl(AttentionImpl[_Metadata]):  # type: ignore[misc]
    """Attention of one layer.

    Args:
        layout: What lies where in its blocks.
        prefill: See `kvloom.Plan`.
        matrices: The plan's calibrated rotations of the layer, by side: float16 ``[kv_heads, head_dim, head_dim]``.
        num_heads: Query heads.
        scale: Factor of the scores.
        softcap: Soft cap of the scores, or None.
        sink_logits: ``[num_heads]`` extra logits of the softmax, or None.
    """

    kv_cache_dtype = "auto"

    def __init__(
        self,
        layout: BlockLayout,
        prefill: Prefill,
        matrices: Mapping[Role, torch.Tensor],
        *,
        num_heads: int,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        self.layout, self.prefill, self.matrices = layout, prefill, matrices
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, layout.kv_heads, layout.head_dim
        self.scale, self.softcap, self.sink_logits = scale, softcap, sink_logits
        self._rotations: dict[Role, SideRotation | None] = {}

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: _Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the tokens of a pass to the cache, and attend.

        Args:
            layer: The layer.
            query: ``[tokens, num_heads, head_dim]``.
            key: ``[tokens, kv_heads, head_dim]``.
            value: The same shape.
            kv_cache: uint8 ``[blocks, 1, 1, layout.nbytes]``.
            attn_metadata: The sequences of the pass; None in a pass that measures memory.
            output: ``[tokens, num_heads, head_dim]``, filled in.
            output_scale: Not for this backend.
            output_block_scale: Not for this backend.
        """
        if attn_metadata is None:
            return output.zero_()
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        query, key, value = self._turned(query, key, value)
        passes = []
        for table, length, start, stop in zip(
            attn_metadata.tables, attn_metadata.lengths, attn_metadata.starts, attn_metadata.starts[1:], strict=False
        ):
            sequence = Sequence(self.layout, kv_cache.flatten(1), table, key.dtype)
            computed = length - (stop - start)
            tail = sequence.append(key[:, :, start:stop], value[:, :, start:stop], computed)
            passes.append((sequence, tail, computed, length, slice(start, stop)))
        for sequence, tail, computed, length, own in passes:  # after all appends: a sequence may share new blocks
            kv = sequence.cache(tail, computed, length, self.prefill)
            out = kernels.backend(query.device).attend(
                query[:, :, own], kv, scaling=self.scale, softcap=self.softcap, sink_logits=self.sink_logits
            )
            output[own] = self._restored(out[0])
        return output

    def _turned(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States as they are cached, and queries to match, ``[1, heads, tokens, head_dim]``."""
        for_keys, for_values = (self._rotation(side, key) for side in ("key", "value"))
        if for_keys:
            query, key = turned(query, for_keys.dual), for_keys.cached(key)
        return query, key, for_values.cached(value) if for_values else value

    def _restored(self, out: torch.Tensor) -> torch.Tensor:
        """What attention returns, ``[tokens, num_heads, head_dim]``, turned back."""
        rotation = self._rotations["value"]
        if not rotation:
            return out
        return turned(out.transpose(0, 1)[None], rotation.dual.transpose(-1, -2))[0].transpose(0, 1)

    def _rotation(self, side: Role, states: torch.Tensor) -> SideRotation | None:
        if side not in self._rotations:
            sides = [getattr(layout, side) for layout in self.layout.layouts]
            self._rotations[side] = side_rotation(sides, self.matrices.get(side), states.dtype, states.device)
        return self._rotations[side]
