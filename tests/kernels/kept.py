"""Random caches whose heads keep different numbers of pages, and what attention over them is in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from kvloom.kernels._torch import TORCH, _decode_side
from kvloom.pages import ExactKV, Format, HeadPages, KeptRecords, PagedKV, PageLayout, page_layout, stored

PATTERNS = ("none", "padding", "holes")


@dataclass
class Kept:
    """A cache, its newest queries and a mask by place; keys, values (float64) and places of every head's tokens."""

    kv: PagedKV
    query: torch.Tensor
    mask: torch.Tensor | None
    states: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]

    def expected(self, scaling: float, softcap: float | None = None) -> torch.Tensor:
        """float64 ``[batch, queries, query_heads, head_dim]``, head by head and query by query."""
        batch, query_heads, queries, _ = self.query.shape
        group = query_heads // len(self.states[0])
        out = torch.zeros(batch, queries, query_heads, self.query.shape[3], dtype=torch.float64)
        for b in range(batch):
            for h in range(query_heads):
                key, value, at = self.states[b][h // group]
                for i in range(queries):
                    scores = key @ self.query[b, h, i].double().cpu() * scaling
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    seen = at <= at[len(at) - queries + i] if self.mask is None else self.mask[b, 0, i, at].cpu()
                    out[b, i, h] = torch.softmax(scores.masked_fill(~seen, -torch.inf), 0) @ value
        return out


def formats(rng: random.Random, dim: int) -> tuple[Format, Format]:
    key = Format(rng.choice([2, 4, 8]), "per_channel", 64)
    return key, Format(rng.choice([2, 4, 8]), "per_token", dim)


def kept_case(
    seed: int,
    *,
    layouts: tuple[PageLayout, ...] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    pattern: str | None = None,
    most: int = 4,
    queries: int | None = None,
) -> Kept:
    """Up to ``most`` kept pages of a head, none of some heads; records in any order, and some that nobody has."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pattern = rng.choice(PATTERNS) if pattern is None else pattern
    dim = layouts[0].head_dim if layouts else rng.choice([64, 80, 128])
    layouts = layouts or (page_layout(*formats(rng, dim), dim, dtype.itemsize),) * rng.randint(1, 3)
    heads, batch, page = len(layouts), rng.randint(1, 3), layouts[0].page_tokens
    group = rng.choice([1, 2, 4, 7, 8, 16])
    queries = rng.choice([1, 1, 2, 3]) if queries is None else queries
    sinks, tail = rng.choice([0, 4, 20]), max(queries, rng.choice([1, 17, 40]))
    counts = torch.tensor([[rng.choice([0, 1, most // 2, most]) for _ in range(heads)] for _ in range(batch)])
    places_dtype = rng.choice([torch.int16, torch.int32])
    span = sinks + 4 * most * page + tail  # places that the kept tokens are drawn from
    kept_at = [
        [torch.randperm(span - sinks - tail, generator=generator)[: int(n) * page].sort().values + sinks for n in row]
        for row in counts
    ]
    exact_at = torch.cat([torch.arange(sinks), torch.arange(span - tail, span)]).expand(batch, heads, -1)

    exact = draw(2, batch, heads, sinks + tail, dim).to(dtype)
    groups, states = [], [[None] * heads for _ in range(batch)]
    for layout in dict.fromkeys(layouts):
        of = tuple(h for h in range(heads) if layouts[h] == layout)
        own = counts[:, of]
        records = int(own.sum()) + 2
        key, value = (draw(1, 1, records * page, dim).to(dtype) for _ in range(2))
        data = TORCH.encode(key, value, layout)
        order = torch.randperm(int(own.sum()) and own.numel(), generator=generator)  # heads lie in any order
        first = torch.zeros(own.numel(), dtype=torch.long)
        first[order] = 1 + own.flatten()[order].cumsum(0) - own.flatten()[order]
        first = first.view_as(own)
        slots = torch.zeros(1, 1, records, page, dtype=torch.long)
        decoded = [_decode_side(data, side, torch.float32)[0, 0].double() for side in (layout.key, layout.value)]
        for b in range(batch):
            for n, h in enumerate(of):
                start, count = int(first[b, n]), int(own[b, n])
                slots[0, 0, start : start + count] = kept_at[b][h].view(count, page)
                sides = [
                    torch.cat(
                        [e[b, h, :sinks].double(), x[start * page : (start + count) * page], e[b, h, sinks:].double()]
                    )
                    for e, x in zip(exact, decoded, strict=True)
                ]
                at = torch.cat([exact_at[b, h, :sinks], kept_at[b][h], exact_at[b, h, sinks:]])
                states[b][h] = (*sides, at)
        extents = torch.stack([first, own], dim=-1).int()
        kept = KeptRecords(extents.to(device), stored(slots, places_dtype).to(device))
        groups.append(HeadPages(of, layout, data.to(device), kept))
    of_sinks, of_tail = (ExactKV(*(x.to(device) for x in exact.split([sinks, tail], dim=3)[i])) for i in range(2))
    kv = PagedKV(
        tuple(groups),
        of_sinks,
        of_tail,
        sinks + tail,
        page,
        0,
        torch.zeros(queries, dtype=torch.long, device=device),
        places=stored(exact_at, places_dtype).to(device),
    )
    query = (2 * draw(batch, queries, heads * group, dim)).to(dtype).transpose(1, 2)
    mask = _mask(pattern, batch, queries, span, tail, generator)
    return Kept(kv, query.to(device), None if mask is None else mask.to(device), states)


def _mask(pattern: str, batch: int, queries: int, span: int, tail: int, generator: torch.Generator):
    """Boolean ``[batch, 1, queries, span]``: causal, and padding on the left or anywhere before the tail."""
    if pattern == "none":
        return None
    mask = torch.ones(queries, span, dtype=torch.bool).tril(span - queries).expand(batch, 1, -1, -1).clone()
    for b in range(batch):
        hidden = torch.arange(span) < b * 37 % span
        if pattern == "holes":
            hidden = torch.rand(span, generator=generator) < 0.3
        mask[b] &= ~(hidden & (torch.arange(span) < span - tail))
    return mask
