"""Random caches whose pages lie in shared blocks, found through a table, and what attention over them is in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from kvloom.kernels._torch import TORCH, _decode_side
from kvloom.pages import ExactKV, Format, HeadPages, PagedKV, PageLayout, SideLayout, StaticKV, page_layout

Spans = list[list[tuple[torch.Tensor, torch.Tensor]]]


@dataclass
class Tabled:
    """A cache of sequences of any length, the newest token's query, and every head's keys and values in float64."""

    kv: StaticKV
    query: torch.Tensor
    states: Spans

    def expected(self, scaling: float, softcap: float | None = None) -> torch.Tensor:
        """float64 ``[batch, 1, query_heads, head_dim]``."""
        return torch.stack([attention(self.query[b], own, scaling, softcap) for b, own in enumerate(self.states)])

    def one(self, row: int, queries: int) -> tuple[PagedKV, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """A sequence as its last tokens, as far as they are exact, see it: cache, queries, and its keys and values."""
        tokens, pages = self.kv.levels()[row].tolist()
        kv = self.kv.paged(slice(row, row + 1), tokens, pages)
        queries = max(1, min(queries, kv.tail.tokens))
        kv = replace(kv, visible=torch.full((queries,), pages, device=kv.device))
        noise = torch.linspace(0.5, 1.5, queries, device=kv.device, dtype=kv.dtype)
        return kv, self.query[row : row + 1] * noise[:, None], self.states[row]


def attention(
    query: torch.Tensor, states: list[tuple[torch.Tensor, torch.Tensor]], scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """float64 ``[queries, query_heads, head_dim]`` of one sequence, whose newest tokens are the queries."""
    heads, queries, dim = query.shape
    group = heads // len(states)
    out = torch.zeros(queries, heads, dim, dtype=torch.float64)
    for h in range(heads):
        key, value = states[h // group]
        for i in range(queries):
            seen = len(key) - queries + i + 1
            scores = key[:seen] @ query[h, i].double().cpu() * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[i, h] = torch.softmax(scores, 0) @ value[:seen]
    return out


def mixed_layouts(seed: int, dim: int, itemsize: int = 4) -> tuple[PageLayout, ...]:
    """One to four KV heads of one or two layouts."""
    rng = random.Random(seed)
    value = Format(rng.choice([2, 3, 4, 16]), "per_token", dim)
    choice = [
        page_layout(Format(rng.choice([2, 4, 6, 8]), "per_channel", 64), fmt, dim, itemsize)
        for fmt in (value, Format(rng.choice([1, 2, 4]), "per_token", 16))
    ]
    return tuple(rng.choice(choice) for _ in range(rng.randint(1, 4)))


def tabled_case(
    seed: int,
    layouts: tuple[PageLayout, ...],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    most: int = 4,
    batch: int | None = None,
) -> Tabled:
    """Up to ``most`` pages a sequence, some of them shared; a sequence of one token; NaN wherever nobody may look."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    batch = rng.randint(2, 5) if batch is None else batch
    heads, page, dim = len(layouts), layouts[0].page_tokens, layouts[0].head_dim
    sinks, blocks = rng.choice([0, 4, 20]), batch * most + 2
    table = _table(rng, batch, most, blocks)
    of = {layout: tuple(h for h in range(heads) if layouts[h] == layout) for layout in layouts}
    storage = torch.full((blocks, sum(layout.nbytes for layout in layouts)), 255, dtype=torch.uint8)
    decoded: list[tuple[torch.Tensor, ...]] = [()] * heads
    groups, start = [], 0
    for layout, own in of.items():
        key, value = (draw(1, len(own), (blocks - 1) * page, dim).to(dtype) for _ in range(2))
        records = TORCH.encode(key, value, layout)[0]  # of all blocks but the last, which stays NaN
        end = start + len(own) * layout.nbytes
        storage[:-1, start:end] = records.transpose(0, 1).flatten(1)
        for i, head in enumerate(own):
            decoded[head] = tuple(_pages(records[i], side, dtype) for side in (layout.key, layout.value))
        groups.append((own, layout, start, end))
        start = end
    counts = [rng.choice([0, 1, most // 2, most, most]) for _ in range(batch)]
    tails = [rng.randint(1, page) for _ in range(batch)]
    lengths = [sinks + count * page + tail for count, tail in zip(counts, tails, strict=True)]
    counts[0], lengths[0] = 0, 1
    exact = torch.full((batch, sinks + page, 2, heads, dim), torch.nan)
    states: Spans = []
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        first, newest = min(sinks, length), length - min(sinks, length) - count * page
        exact[b, :first], exact[b, sinks : sinks + newest] = draw(first, 2, heads, dim), draw(newest, 2, heads, dim)
        held = torch.cat([exact[b, :first], exact[b, sinks : sinks + newest]]).to(dtype).double()
        states.append([])
        for head in range(heads):
            packed = [x[table[b, :count].long()].flatten(0, 1) for x in decoded[head]]
            sides = [torch.cat([held[:first, i, head], packed[i], held[first:, i, head]]) for i in range(2)]
            states[-1].append((sides[0], sides[1]))
        table[b, count:] = blocks - 1
    stored, exact = storage.to(device), exact.to(device, dtype)
    key, value = exact.permute(2, 0, 3, 1, 4)
    kv = StaticKV(
        tuple(
            HeadPages(own, layout, stored[:, s:e].unflatten(1, (len(own), -1)).transpose(0, 1)[None])
            for own, layout, s, e in groups
        ),
        ExactKV(key[:, :, :sinks], value[:, :, :sinks]),
        ExactKV(key[:, :, sinks:], value[:, :, sinks:]),
        torch.tensor([*sum(zip(lengths, counts, strict=True), ()), 0], dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
        ((torch.arange(max(lengths) + 1) - sinks).clamp_min(0) // page).int().to(device),
        page,
        table.to(device)[:, : max(counts)],
    )
    query = 2 * draw(batch, heads * rng.choice([1, 2, 4, 7, 8, 16]), 1, dim)
    return Tabled(kv, query.to(dtype).to(device), states)


def _pages(records: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """float64 ``[pages, page_tokens, head_dim]`` of one side of records ``[pages, layout.nbytes]``."""
    tokens = _decode_side(records[None, None], side, dtype if side.fmt.is_passthrough else torch.float32)
    return tokens[0, 0].double().unflatten(0, (-1, side.page_tokens))


def _table(rng: random.Random, batch: int, most: int, blocks: int) -> torch.Tensor:
    """Blocks in any order; a sequence may begin with the blocks of the one before it."""
    free = list(range(blocks - 1))
    rng.shuffle(free)
    rows: list[list[int]] = []
    for _ in range(batch):
        shared = rows[-1][: rng.randint(0, most)] if rows and rng.random() < 0.5 else []
        rows.append(shared + [free.pop() for _ in range(most - len(shared))])
    return torch.tensor(rows, dtype=torch.int32)
