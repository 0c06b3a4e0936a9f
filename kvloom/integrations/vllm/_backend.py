"""vLLM's attention backend of one layer: append to blocks, pack, attend; sequences that decode all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvloom import kernels
from kvloom.cache import SideRotation, side_rotation
from kvloom.integrations.vllm._blocks import Blocks, Index, index
from kvloom.integrations.vllm._decoding import Decoding
from kvloom.integrations.vllm._layout import BlockLayout
from kvloom.integrations.vllm._sequence import Sequence
from kvloom.integrations.vllm._spec import KvloomSpec
from kvloom.integrations.vllm._stretch import Stretch, Varlen, stretches
from kvloom.integrations.vllm._watch import watch
from kvloom.pages import PagedKV, PooledKV, Role
from kvloom.plan import Prefill


@dataclass(frozen=True)
class _Metadata(AttentionMetadata):  # type: ignore[misc]
    """The sequences of a pass.

    Attributes:
        stretches: Those with several tokens.
        decoding: Those with one; None if there are none.
    """

    stretches: list[Stretch]
    decoding: Decoding | None


def _metadata(common: Any, spec: KvloomSpec, capacity: int) -> _Metadata:
    """From vLLM's metadata, as far as the host has it: lengths are exact, since nothing is speculated."""
    if common.max_query_len == 1:  # rows that only fill up a graph's batch are computed, too
        return _Metadata([], _decoding(common, spec, capacity, slice(0, common.num_reqs), slice(0, common.num_reqs)))
    starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
    several, rows = [], []
    for row, (start, stop, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if stop == start + 1:
            rows.append(row)
        elif stop > start:  # rows of padding have no token
            table = common.block_table_tensor[row]
            several.append(Sequence(slice(start, stop), length - (stop - start), table))
    if not rows:
        return _Metadata(stretches(several), None)
    device = common.seq_lens.device
    tokens = index([starts[row] for row in rows], device)
    return _Metadata(stretches(several), _decoding(common, spec, capacity, tokens, index(rows, device)))


def _decoding(common: Any, spec: KvloomSpec, capacity: int, tokens: Index, rows: Index) -> Decoding:
    return Decoding(
        tokens,
        common.seq_lens[rows],
        common.block_table_tensor[rows],
        most=common.max_seq_len,
        capacity=capacity,
        kv_heads=spec.num_kv_heads,
        sinks=spec.sinks,
        page_tokens=spec.block_size,
    )


class _MetadataBuilder(AttentionMetadataBuilder[_Metadata]):  # type: ignore[misc]
    """Takes from vLLM's metadata what sequences are read by, once a pass for all layers."""

    _newest: ClassVar[tuple[Any, _Metadata] | None] = None

    def __init__(self, kv_cache_spec: KvloomSpec, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._capacity = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:  # noqa: ARG003
        """Whether a pass of sequences that decode can be one graph, attention included."""
        specs = getattr(kv_cache_spec, "kv_cache_specs", {"": kv_cache_spec})  # of one layer, or by layer
        if all(spec.is_graph_safe for spec in specs.values()):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> _Metadata:
        """Metadata of a pass.

        Raises:
            CacheError: What an earlier pass packed is out of range.
        """
        newest = _MetadataBuilder._newest
        if newest is None or newest[0] is not common_attn_metadata:
            watch(common_attn_metadata.block_table_tensor.device).check()
            newest = common_attn_metadata, _metadata(common_attn_metadata, self.kv_cache_spec, self._capacity)
            _MetadataBuilder._newest = newest
        return newest[1]


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
            is_graph_safe=kernels.backend(torch.device(current_platform.device_type)).is_graph_safe(
                cls.layout.layouts, spec.dtype
            ),
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
        varlen: What computes the same over plain tensors, see `varlen_of`; None leaves it to kvloom's backend.
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
        varlen: Varlen | None = None,
    ) -> None:
        self.layout, self.prefill, self.matrices = layout, prefill, matrices
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, layout.kv_heads, layout.head_dim
        self.scale, self.varlen = scale, varlen
        self._options: dict[str, Any] = {"scaling": scale, "softcap": softcap, "sink_logits": sink_logits}
        self._rotations: dict[Role, SideRotation | None] = {}

    @property
    def is_capped(self) -> bool:
        """Whether scores have a soft cap."""
        return self._options["softcap"] is not None

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
        blocks = Blocks(self.layout, kv_cache.flatten(1), key.dtype, watch(key.device).flags)
        stretches, decoding = attn_metadata.stretches, attn_metadata.decoding
        tails = {
            each: each.append(blocks, *self._cached(_of_one(key, each), _of_one(value, each)))
            for stretch in stretches
            for each in stretch.sequences
        }
        if decoding is not None:
            appended = self._appended(_one_each(key, decoding), _one_each(value, decoding))
            now = decoding.append(blocks, *appended, self._query_turn(query), self._output_turn(query))
        # Reading comes after all appends: a sequence may share new blocks.
        for stretch in stretches:
            if self.varlen is not None and self._reads_begun(stretch):
                own = stretch.own
                stretch.attend(self.varlen, query[own], key[own], value[own], output[own])
                continue
            for each in stretch.sequences:
                kv = each.cache(blocks, tails[each], self.prefill)
                self._read(stretch, kv, _of_one(query, each), output[each.own])
        if decoding is not None:
            self._attend_one_each(query, decoding, now, output)
        return output

    def _attend_one_each(self, query: torch.Tensor, decoding: Decoding, kv: PooledKV, output: torch.Tensor) -> None:
        """Attention of the tokens that are decoded; straight into ``output`` where that is one piece of it."""
        own = output[decoding.tokens][:, None] if isinstance(decoding.tokens, slice) else None
        own = own if own is not None and own.is_contiguous() else None
        query = _one_each(query, decoding)
        out = kernels.backend(query.device).attend_pooled(query, kv, own, **self._options)
        if own is None:
            output[decoding.tokens] = out[:, 0]

    def _reads_begun(self, stretch: Stretch) -> bool:
        """Whether attention reads the pass's own states and nothing else: unturned, then, which gives the same."""
        return stretch.is_begun and self.prefill == "exact"

    def _read(self, stretch: Stretch, kv: PagedKV, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of the tokens of one sequence over what is cached of it.

        Args:
            stretch: The sequence is one of it.
            kv: Its cache.
            query: ``[1, num_heads, tokens, head_dim]``.
            output: ``[tokens, num_heads, head_dim]``, filled in.
        """
        backend, query = kernels.backend(query.device), self._turned(query)
        rows = self.num_heads // self.num_kv_heads * len(output)
        # Few rows read packed pages faster; with other prefills than exact, queries differ in what they read.
        if self.varlen is None or self.prefill != "exact" or rows <= kv.page_tokens:
            output[:] = self._restored(backend.attend(query, kv, **self._options))[0]
            return
        out = output if self._rotation("value", output) is None else torch.empty_like(output)
        key, value = (x[0].transpose(0, 1) for x in backend.all_states(kv, in_order=True))
        stretch.attend(self.varlen, query[0].transpose(0, 1), key, value, out)
        if out is not output:
            output[:] = self._restored(out[None])[0]

    def _cached(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[batch, kv_heads, tokens, head_dim]`` as they are cached."""
        for_keys, for_values = (self._rotation(side, key) for side in ("key", "value"))
        return for_keys.cached(key) if for_keys else key, for_values.cached(value) if for_values else value

    def _appended(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States as `kvloom.kernels.Backend.append` takes them."""
        for_keys, for_values = (self._rotation(side, key) for side in ("key", "value"))
        return for_keys.appended(key) if for_keys else key, for_values.appended(value) if for_values else value

    def _turned(self, query: torch.Tensor) -> torch.Tensor:
        """Queries ``[batch, num_heads, tokens, head_dim]`` to match the cached keys."""
        return kernels.turned(query, self._query_turn(query))

    def _restored(self, out: torch.Tensor) -> torch.Tensor:
        """What attention returns, ``[batch, tokens, num_heads, head_dim]``, turned back."""
        return kernels.turned_back(out, self._output_turn(out))

    def _query_turn(self, like: torch.Tensor) -> torch.Tensor | None:
        """See `kvloom.pages.PagedKV`."""
        rotation = self._rotation("key", like)
        return rotation.dual if rotation else None

    def _output_turn(self, like: torch.Tensor) -> torch.Tensor | None:
        """See `kvloom.pages.PagedKV`."""
        rotation = self._rotation("value", like)
        return rotation.output_turn if rotation else None

    def _rotation(self, side: Role, states: torch.Tensor) -> SideRotation | None:
        if side not in self._rotations:
            sides = [getattr(layout, side) for layout in self.layout.layouts]
            self._rotations[side] = side_rotation(sides, self.matrices.get(side), states.dtype, states.device)
        return self._rotations[side]


def varlen_of(impl: Any) -> Varlen | None:
    """What computes attention over plain tensors as vLLM itself would in a layer; None where it would by other means.

    Args:
        impl: vLLM's own attention of the layer, which knows what its FlashAttention is fit for.
    """
    if not isinstance(impl, FlashAttentionImpl) or impl.vllm_flash_attn_version is None:
        return None
    return partial(
        fa_utils.flash_attn_varlen_func,
        softmax_scale=impl.scale,
        causal=True,
        softcap=impl.logits_soft_cap,
        fa_version=impl.vllm_flash_attn_version,
        num_splits=1 if impl.batch_invariant_enabled or impl.fa4_hd256 else 0,
        s_aux=impl.sinks,
    )


def _of_one(states: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """``[1, heads, tokens, head_dim]`` of the tokens of one sequence, of all ``[tokens, heads, head_dim]``."""
    return states[sequence.own].transpose(0, 1)[None]


def _one_each(states: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """``[sequences, heads, 1, head_dim]`` of the tokens that are decoded, of all ``[tokens, heads, head_dim]``."""
    return states[decoding.tokens][:, :, None]
