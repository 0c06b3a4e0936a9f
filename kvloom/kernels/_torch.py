"""The reference backend: plain torch, any device, exact in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvloom import codecs
from kvloom.codecs import Encoded, Outliers, wide
from kvloom.kernels._base import AttendOptions, Backend, exact_states, rows_of_a_head
from kvloom.kernels._between_pages import append_token, is_between_pages, mask_of_room
from kvloom.kernels._folded import packed_scores, packed_values
from kvloom.kernels._kept import padded
from kvloom.pages import (
    PagedKV,
    PageLayout,
    Role,
    SideLayout,
    StaticKV,
    pack_outliers,
    pack_side,
    records_of,
    unpack_outliers,
    unpack_raw,
    unpack_side,
)

# Queries are taken this many scores at a time, so that a long prompt needs no [tokens, tokens] matrix.
SCORE_BLOCK = 1 << 24


class _Options(TypedDict):
    scaling: float
    softcap: float | None
    sink_logits: torch.Tensor | None


class TorchBackend(Backend):
    """Reference implementation: correct everywhere, fast enough on a CPU."""

    name = "torch"

    def encode(
        self, key: torch.Tensor, value: torch.Tensor, layout: PageLayout, flags: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Backend.encode`."""
        return torch.cat([_encode_side(key, layout.key), _encode_side(value, layout.value)], dim=-1)

    def decode(
        self, data: torch.Tensor, layout: PageLayout, dtype: torch.dtype, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.decode`."""
        data = data if table is None else records_of(data, table)
        return _decode_side(data, layout.key, dtype), _decode_side(data, layout.value, dtype)

    def attend(
        self,
        query: torch.Tensor,
        kv: PagedKV,
        *,
        scaling: float,
        mask: torch.Tensor | None = None,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backend.attend`."""
        options: _Options = {"scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
        if kv.places is not None:
            kv, mask = padded(kv, mask, query.shape[1], query.shape[2])
        if kv.num_pages == 0:
            return dense_attention(query, *exact_states(kv), mask=mask, **options)
        is_readable = all(group.layout.is_readable for group in kv.pages)
        if rows_of_a_head(query, kv) > kv.page_tokens or not is_readable:
            in_order = mask is None and _is_without_overlap(kv)
            columns = None if in_order else column_mask(kv, mask, query.shape[2])
            return dense_attention(query, *self.all_states(kv, in_order=in_order), mask=columns, **options)
        columns = column_mask(kv, mask, query.shape[2])
        return self._folded_attention(query, *exact_states(kv), kv.in_order(), columns, **options)

    def is_graph_safe_between_pages(self, layouts: Sequence[PageLayout], dtype: torch.dtype) -> bool:
        """See `Backend.is_graph_safe_between_pages`."""
        is_one = all(layout.is_readable and layout == layouts[0] for layout in layouts)
        return is_one or self.is_graph_safe(layouts, dtype)

    def _append(self, key: torch.Tensor, value: torch.Tensor, kv: StaticKV) -> None:
        if is_between_pages():
            append_token(self, key, value, kv)
        else:
            super()._append(key, value, kv)

    def _attend_static(self, query: torch.Tensor, kv: StaticKV, **options: Unpack[AttendOptions]) -> torch.Tensor:
        if not is_between_pages():
            return super()._attend_static(query, kv, **options)
        mask = mask_of_room(kv, options.get("mask"), query.shape[1])
        others: _Options = {
            "scaling": options["scaling"],
            "softcap": options.get("softcap"),
            "sink_logits": options.get("sink_logits"),
        }
        if not kv.pages[0].data.numel():
            return dense_attention(query, *exact_states(kv), mask=mask, **others)
        return self._folded_attention(query, *exact_states(kv), kv, mask, **others)

    def packed_scores(self, x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
        """See `kvloom.kernels._folded.packed_scores`."""
        return packed_scores(x, pages, side, dtype)

    def packed_values(self, x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
        """See `kvloom.kernels._folded.packed_values`."""
        return packed_values(x, pages, side, dtype)

    def _folded_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv: PagedKV | StaticKV,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Few queries: read packed pages with folded scales. ``mask`` is by column [sinks, tail, pages]."""
        q = _grouped(wide(query) * scaling, key.shape[1])  # [batch, kv_heads, rows, head_dim]
        exact = q @ wide(key).transpose(-1, -2)
        scores = torch.cat([exact, self._by_head(q, kv, "key")], dim=-1)
        weights = _softmax(scores.unflatten(2, (-1, query.shape[2])), mask, softcap, sink_logits).flatten(2, 3)
        out = weights[..., : key.shape[2]] @ wide(value)
        out = out + self._by_head(weights[..., key.shape[2] :], kv, "value")
        return _ungrouped(out, query.shape[1]).to(query.dtype)

    def _by_head(self, x: torch.Tensor, kv: PagedKV | StaticKV, role: Role) -> torch.Tensor:
        """Products of ``x [batch, kv_heads, rows, ...]`` with one side of the pages, group of heads by group.

        Records that the heads share are multiplied with the rows of all of them.
        """
        product = self.packed_scores if role == "key" else self.packed_values
        parts: list[torch.Tensor] = []
        for group in kv.pages:
            own = x if len(kv.pages) == 1 else x[:, list(group.heads)]
            side = group.layout.key if role == "key" else group.layout.value
            shared = group.data.shape[1] < own.shape[1]
            rows = own.flatten(1, 2) if shared else own.flatten(0, 1)
            out = product(rows, group.data.flatten(0, 1), side, kv.dtype)
            parts.append(out.unflatten(1, own.shape[1:3]) if shared else out.unflatten(0, own.shape[:2]))
        if len(parts) == 1:
            return parts[0]
        order = [head for group in kv.pages for head in group.heads]
        return torch.cat(parts, dim=1)[:, sorted(range(len(order)), key=order.__getitem__)]


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    is_causal: bool = True,
) -> torch.Tensor:
    """Attention over plain tensors, for passes without pages and layers without packing.

    Args:
        query: ``[batch, query_heads, queries, head_dim]``, the newest tokens.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: The same shape.
        scaling: Factor of the scores.
        mask: None, or ``[batch or 1, heads or 1, queries, tokens]``, boolean or additive.
        softcap: See `Backend.attend`.
        sink_logits: See `Backend.attend`.
        is_causal: Whether no mask means causal, rather than that every query reads all tokens.

    Returns:
        ``[batch, queries, query_heads, head_dim]`` in the query's dtype.
    """
    queries, tokens = query.shape[2], key.shape[2]
    hides_newer = is_causal and mask is None and queries > 1
    if softcap is None and sink_logits is None:
        if queries == 1 and (mask is None or mask.shape[1] == 1):  # heads of a group as queries: keys are read once
            rows = _grouped(query, key.shape[1])
            return _ungrouped(
                scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling), query.shape[1]
            )
        if hides_newer and queries < tokens:
            mask = causal_lower_right(queries, tokens)  # no mask in memory, where a kernel knows the case
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=hides_newer and mask is None, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()
    if hides_newer:
        mask = _causal(queries, tokens, query.device)
    step = max(1, SCORE_BLOCK // (query.shape[0] * query.shape[1] * tokens))
    blocks = []
    for i in range(0, queries, step):
        scores = _grouped(wide(query[:, :, i : i + step]) * scaling, key.shape[1]) @ wide(key).transpose(-1, -2)
        part = None if mask is None else mask[:, :, i : i + step]
        weights = _softmax(
            scores.unflatten(2, (-1, query[:, :, i : i + step].shape[2])),
            part,
            softcap,
            sink_logits,
        )
        blocks.append(_ungrouped(weights.flatten(2, 3) @ wide(value), query.shape[1]))
    return torch.cat(blocks, dim=1).to(query.dtype)


def _grouped(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[batch, query_heads, queries, dim]`` -> ``[batch, kv_heads, heads per group * queries, dim]``."""
    batch, query_heads, queries, dim = query.shape
    return query.reshape(batch, kv_heads, query_heads // kv_heads * queries, dim)


def _ungrouped(out: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Inverse of `_grouped`, as ``[batch, queries, query_heads, dim]``."""
    batch, kv_heads, rows, dim = out.shape
    return out.reshape(batch, query_heads, kv_heads * rows // query_heads, dim).transpose(1, 2).contiguous()


def _softmax(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Weights of ``scores [batch, kv_heads, heads per group, queries, columns]``.

    A query that may attend to nothing (padding) gets finite, meaningless weights: NaN would spread through the cache.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        grouped = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3])
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~grouped, torch.finfo(scores.dtype).min)
        else:
            scores = (scores + grouped).clamp_min(torch.finfo(scores.dtype).min)
    if sink_logits is None:
        return torch.softmax(scores, dim=-1)
    extra = sink_logits.to(scores.dtype).view(1, scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]


def _is_without_overlap(kv: PagedKV) -> bool:
    """Whether no slot is in a page and in the tail: every query then reads all pages."""
    is_kept = any(group.kept is not None for group in kv.pages)
    return not is_kept and kv.sinks.tokens + kv.num_pages * kv.page_tokens + kv.tail.tokens == kv.length


def column_mask(kv: PagedKV, mask: torch.Tensor | None, queries: int) -> torch.Tensor | None:
    """Mask by column [sinks, tail, pages]: causality, the caller's mask, and which copy of a slot a query reads."""
    if queries == 1 and mask is None:
        return None  # one query reads every page and the whole tail
    exact, packed = kv.exact_slots(), kv.page_slots()
    columns = torch.cat([exact, packed])
    query_slots = torch.arange(kv.length - queries, kv.length, device=kv.device)[:, None]
    boundary = (kv.sinks.tokens + kv.visible * kv.page_tokens)[:, None]
    reads_exact = (exact < kv.sinks.tokens) | (exact >= boundary)
    reads = torch.cat([reads_exact, packed < boundary], dim=-1)
    if mask is None:
        return (reads & (columns <= query_slots))[None, None]
    chosen = mask[..., columns]
    if mask.dtype == torch.bool:
        return chosen & reads
    return chosen.masked_fill(~reads, torch.finfo(chosen.dtype).min)


def _causal(queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    ones = torch.ones((queries, tokens), dtype=torch.bool, device=device)
    return ones.tril(tokens - queries)[None, None]


def _encode_side(x: torch.Tensor, side: SideLayout) -> torch.Tensor:
    x = x.unflatten(-2, (-1, side.page_tokens))  # [batch, heads, pages, page_tokens, head_dim]
    if side.fmt.is_passthrough:
        return pack_side(x, (), side)
    if not side.num_outliers:
        return _encode_dense(x, side)
    dense, outliers = codecs.split(x, side.fmt, side.num_outliers)
    return torch.cat([_encode_dense(dense, side), pack_outliers(outliers.index, outliers.values)], dim=-1)


def _encode_dense(x: torch.Tensor, side: SideLayout) -> torch.Tensor:
    encoded = codecs.get(side.fmt.codec).encode(x, side.fmt)
    return pack_side(encoded.codes, encoded.params, side)


def _decode_side(data: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    if side.fmt.is_passthrough:
        return unpack_raw(data, side, dtype).flatten(2, 3)
    codes, (scale, zero) = unpack_side(data, side)
    values = codecs.get(side.fmt.codec).decode(Encoded(codes, (scale, zero)), side.fmt)
    if side.num_outliers:
        values = codecs.joined(values, Outliers(*unpack_outliers(data, side)))
    values = values.flatten(2, 3)
    if dtype == torch.float16:  # a scale rounded up can lift an extreme of fp16 over its end
        values.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)


TORCH = TorchBackend()
