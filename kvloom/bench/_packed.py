"""Attention over pages and packing into pages, timed; attention also checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kvloom.bench._bytes import attend_bytes, attend_flops, encode_bytes
from kvloom.bench._caches import packed_cache, random_cache, random_dense, random_query, static_cache
from kvloom.bench._ceilings import Ceilings
from kvloom.bench._error import exact_paged_attention, judged, poisoned, relative_error
from kvloom.bench._figures import Dense, against_dense, rates, times_bound
from kvloom.bench._grid import Grid, Pair, Shape
from kvloom.bench._peers import first_line
from kvloom.bench._timing import Clock, Launch
from kvloom.errors import KernelError
from kvloom.evaluate import Record
from kvloom.kernels import Backend

# A page of appended tokens is many small launches, whose number matters and not where their bytes lie.
APPEND_COPIES = 4
_REFUSALS = (KernelError, NotImplementedError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Cell:
    """One backend at one shape and pair.

    Attributes:
        backend: What is measured.
        grid: Heads, groups, window and dtype.
        shape: Batch and packed tokens.
        pair: Bits.
        device: Where it runs.
    """

    backend: Backend
    grid: Grid
    shape: Shape
    pair: Pair
    device: torch.device


def attend_record(cell: Cell, clock: Clock, ceilings: Ceilings, dense: Dense | None) -> Record:
    """A decode step over pages and window: time, rates, ratios and ``error``."""
    return _unless_refused(lambda: _attend(cell, clock, ceilings, dense))


def encode_record(cell: Cell, clock: Clock, ceilings: Ceilings) -> Record:
    """Packing a whole cache: time and rates over the bytes read and written."""
    return _unless_refused(lambda: _encode(cell, clock, ceilings))


def append_record(cell: Cell, clock: Clock) -> Record:
    """One layer's upkeep in a decode step of a cache of fixed size, amortised over a page: ``seconds`` of a step.

    A token is copied into the window at every step; at the last step of a page the page is packed into its place.
    """
    return _unless_refused(lambda: _append(cell, clock))


def _unless_refused(measure: Callable[[], Record]) -> Record:
    try:
        return {"skipped": None} | measure()
    except _REFUSALS as error:
        return {"skipped": first_line(error)}


def _attend(cell: Cell, clock: Clock, ceilings: Ceilings, dense: Dense | None) -> Record:
    grid, shape = cell.grid, cell.shape
    nbytes = attend_bytes(grid, shape, cell.pair)
    error = _attend_error(cell)
    query = random_query(grid, shape, cell.device)
    caches = [random_cache(grid, shape, cell.pair, cell.device) for _ in range(clock.copies(nbytes))]
    timing = clock.time([partial(cell.backend.attend, query, kv, scaling=grid.scaling) for kv in caches])
    return {
        "copies": len(caches),
        **rates(timing, nbytes, ceilings),
        "times_bound": times_bound(timing, nbytes, ceilings),
        "flops": attend_flops(grid, shape, shape.tokens + grid.window),
        **against_dense(timing, nbytes, dense),
        **judged(error),
    }


def _attend_error(cell: Cell) -> float:
    grid = cell.grid
    kv = packed_cache(cell.backend, grid, cell.shape, cell.pair, cell.device)
    query = random_query(grid, cell.shape, cell.device)
    with poisoned():
        out = cell.backend.attend(query, kv, scaling=grid.scaling)
    return relative_error(out.squeeze(1), exact_paged_attention(query, kv, grid.scaling))


def _encode(cell: Cell, clock: Clock, ceilings: Ceilings) -> Record:
    nbytes = encode_bytes(cell.grid, cell.shape, cell.pair)
    layout = cell.grid.layout(cell.pair)
    copies = clock.copies(nbytes)
    inputs = [random_dense(cell.grid, cell.shape, cell.shape.tokens, cell.device) for _ in range(copies)]
    kept: dict[int, torch.Tensor] = {}

    def launch(index: int) -> None:
        kept[index] = cell.backend.encode(*inputs[index], layout)  # kept, so that each copy has its own output

    timing = clock.time([partial(launch, index) for index in range(copies)])
    return {"copies": copies, **rates(timing, nbytes, ceilings)}


def _append(cell: Cell, clock: Clock) -> Record:
    steps = cell.grid.layout(cell.pair).page_tokens
    timing = clock.time([_page_of_steps(cell, Shape(cell.shape.batch, steps)) for _ in range(APPEND_COPIES)])
    return {
        "copies": APPEND_COPIES,
        "seconds": timing.seconds / steps,
        "p10": timing.p10 / steps,
        "p90": timing.p90 / steps,
        "method": timing.method,
    }


def _page_of_steps(cell: Cell, page: Shape) -> Launch:
    """As many appended tokens as fill a page, and the packing of that page."""
    key, value = random_dense(cell.grid, page, page.tokens, cell.device)
    kv = static_cache(cell.grid, page, cell.pair, cell.device)

    def launch() -> None:
        kv.state.zero_()
        for slot in range(page.tokens):
            cell.backend.append(key[:, :, slot : slot + 1], value[:, :, slot : slot + 1], kv)

    return launch
