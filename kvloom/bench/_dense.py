"""Dense attention, timed and checked: the baselines of a shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom.bench._bytes import attend_flops, dense_bytes
from kvloom.bench._caches import random_dense, random_query
from kvloom.bench._ceilings import Ceilings
from kvloom.bench._error import exact_attention, judged, relative_error
from kvloom.bench._figures import Dense, rates, times_bound
from kvloom.bench._grid import Grid, Shape
from kvloom.bench._peers import Peer, first_line
from kvloom.bench._timing import Clock
from kvloom.evaluate import Record


def dense_record(
    peer: Peer, grid: Grid, shape: Shape, device: torch.device, clock: Clock, ceilings: Ceilings
) -> Record:
    """Time, rates and error of a peer, or ``skipped``: the sentence that says why there are none.

    Args:
        peer: The dense attention.
        grid: Heads and dtype.
        shape: Batch and tokens.
        device: Where it runs.
        clock: The device's clock.
        ceilings: Its measured rates.
    """
    if lack := peer.lack(grid.dtype):
        return {"name": peer.name, "skipped": lack}
    try:
        return {"name": peer.name, "skipped": None} | _measured(peer, grid, shape, device, clock, ceilings)
    except Exception as error:  # what other people's kernels raise for a shape they do not take
        return {"name": peer.name, "skipped": first_line(error)}


def best_dense(records: Sequence[Record]) -> Dense | None:
    """The fastest of a shape's dense records that computes attention; None if none does."""
    valid = [record for record in records if record["skipped"] is None and record["fault"] is None]
    if not valid:
        return None
    best = min(valid, key=lambda record: float(record["seconds"]))
    return Dense(best["name"], best["seconds"], best["nbytes"])


def _measured(peer: Peer, grid: Grid, shape: Shape, device: torch.device, clock: Clock, ceilings: Ceilings) -> Record:
    query, nbytes = random_query(grid, shape, device), dense_bytes(grid, shape)
    key, value = random_dense(grid, shape, shape.tokens, device)
    launches = [peer.prepare(query, key, value, grid.scaling)]
    error = relative_error(
        launches[0]().view(shape.batch, grid.query_heads, -1), exact_attention(query, key, value, grid.scaling)
    )
    del key, value
    for _ in range(clock.copies(nbytes) - 1):
        launches.append(peer.prepare(query, *random_dense(grid, shape, shape.tokens, device), grid.scaling))
    timing = clock.time(launches)
    return {
        "copies": len(launches),
        **rates(timing, nbytes, ceilings),
        "times_bound": times_bound(timing, nbytes, ceilings),
        "flops": attend_flops(grid, shape, shape.tokens),
        **judged(error),
    }
