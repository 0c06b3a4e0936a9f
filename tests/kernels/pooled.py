"""Random caches whose exact tokens lie in the blocks of the pages, too."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvloom.pages import HeadPages, PooledKV, StaticKV, state_numbers


def pooled(kv: StaticKV, steps: int = 0) -> tuple[PooledKV, torch.Tensor]:
    """A cache with a table (`tabled_case`), its newest tokens the new ones, and room for ``steps`` more.

    Returns:
        The cache, NaN wherever nobody may look, and its blocks, uint8 ``[blocks, bytes]``.
    """
    heads, dim, page = kv.tail.key.shape[1], kv.tail.key.shape[3], kv.page_tokens
    sinks, token = kv.sinks.tokens, 2 * heads * dim * kv.dtype.itemsize
    records = torch.cat([group.data[0].transpose(0, 1).flatten(1) for group in kv.pages], dim=1)
    nbytes = max(records.shape[1], -(-sinks * token // 16) * 16)
    per_block = nbytes // token
    table = _table(kv, len(records), 1 + -(-page // per_block) + steps // page + 1)
    storage = torch.full((int(table.max()) + 1, nbytes), 255, dtype=torch.uint8, device=kv.device)
    storage[: len(records), : records.shape[1]] = records
    rows = storage[:, : per_block * token].view(kv.dtype).unflatten(1, (per_block, 2, heads, dim))
    for b, (tokens, pages) in enumerate(kv.levels().tolist()):
        for slot in (*range(min(sinks, tokens)), *range(sinks + pages * page, tokens)):
            exact = slot - sinks - pages * page
            column = 0 if slot < sinks else (2 if sinks else 1) + pages + exact // per_block
            side, at = (kv.sinks, slot) if slot < sinks else (kv.tail, exact % page)
            row = slot if slot < sinks else exact % per_block
            rows[table[b, column], row] = torch.stack([side.key[b, :, at], side.value[b, :, at]])
    filled = ((torch.arange(int(kv.levels().max()) + steps + 1) - sinks).clamp_min(0) // page).int().to(kv.device)
    made = PooledKV(
        tuple(_groups(kv, storage)),
        rows,
        table,
        sinks,
        max(0, len(filled) - 1 - sinks) // page,
        page,
        torch.stack([kv.levels()[:, 0] - 1, kv.levels()[:, 1]], dim=1),
        torch.zeros(state_numbers(len(table), heads), dtype=torch.int32, device=kv.device),
        torch.zeros(2, dtype=torch.int32, device=kv.device),
        filled,
    )
    made.state[: kv.levels().numel()] = kv.levels().flatten()
    return made, storage


def next_step(kv: PooledKV) -> PooledKV:
    """The same before and with another token of every sequence."""
    tokens = kv.before[:, 0] + 1
    before = torch.stack([tokens, kv.filled[tokens.long()]], dim=1)
    state = kv.state.clone()
    state[: before.numel()] = torch.stack([tokens + 1, before[:, 1]], dim=1).flatten()
    return replace(kv, before=before, state=state)


def _table(kv: StaticKV, first: int, more: int) -> torch.Tensor:
    """A sequence's sinks, its pages, then ``more`` blocks, from block ``first`` on in any order; then no block."""
    assert kv.table is not None
    sinks, batch = min(1, kv.sinks.tokens), len(kv.table)
    order = torch.randperm(batch * (sinks + more), generator=torch.Generator().manual_seed(batch))
    own = (first + order).view(batch, -1).int().to(kv.device)
    table = kv.table.new_full((batch, kv.table.shape[1] + own.shape[1]), -1)
    for b, (_, pages) in enumerate(kv.levels().tolist()):
        columns = torch.cat([own[b, :sinks], kv.table[b, :pages], own[b, sinks:]])
        table[b, : len(columns)] = columns
    return table


def _groups(kv: StaticKV, storage: torch.Tensor) -> list[HeadPages]:
    groups, start = [], 0
    for group in kv.pages:
        stop = start + len(group.heads) * group.layout.nbytes
        data = storage[:, start:stop].unflatten(1, (len(group.heads), -1)).transpose(0, 1)[None]
        groups.append(replace(group, data=data))
        start = stop
    return groups
