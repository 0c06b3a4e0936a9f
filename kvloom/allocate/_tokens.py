"""The joint problem's units: how many tokens a layer keeps, chosen by which policy, and at which bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvloom.allocate._budget import Budget
from kvloom.allocate._knapsack import Options, efficient
from kvloom.plan import Evict, LayerPlan, TensorSpec, Window, head_layouts, itemsize, layer_nbytes, room_of
from kvloom.signals import EvictionTable, LossTable


@dataclass(frozen=True, slots=True)
class Stored:
    """What a layer may store.

    Attributes:
        evict: which tokens; None: all.
        key: format of its keys.
        value: format of its values.
    """

    evict: Evict | None
    key: TensorSpec
    value: TensorSpec


@dataclass(frozen=True, slots=True)
class LayerUnit:
    """One layer's decision: eviction, keys and values at once, since the bytes of a token depend on all three.

    Attributes:
        layer: the layer.
        choices: what each option stores; only those that no other beats in both bytes and loss.
        options: costs in bytes and predicted losses.
    """

    layer: int
    choices: tuple[Stored, ...]
    options: Options


def layer_units(
    table: LossTable, eviction: EvictionTable, policies: tuple[str, ...], budget: Budget, window: Window
) -> list[LayerUnit]:
    """The decisions of a joint plan; their costs add up to `plan.nbytes` and their losses to its predicted loss.

    A candidate's share of a prompt becomes the sinks, the newest exact tokens and the nearest number of whole pages
    at the budget's length: a page that is not full would hold its tokens at 16 bits.

    Args:
        table: formats and their losses.
        eviction: evictions and theirs.
        policies: those a layer may take.
        budget: batch, tokens and compute dtype that bytes count at.
        window: tokens every layer keeps exactly.
    """
    columns = [n for n, each in enumerate(eviction.candidates) if each.policy in policies]
    pairs = [(k, v) for k in range(len(table.key_specs)) for v in range(len(table.value_specs))]
    priced = list(_priced(table, [eviction.candidates[n] for n in columns], pairs, budget, window))
    cost = np.array([nbytes for *_, nbytes in priced], dtype=np.int64)
    evicted, paired = (np.array(numbers) for numbers in list(zip(*priced, strict=True))[1:3])
    units = []
    for row, layer in enumerate(table.layers):
        of_tokens = np.array([0.0, *(eviction.loss[row][n] for n in columns)])
        of_bits = np.add.outer(table.key_loss[row], table.value_loss[row]).ravel()
        options = Options(cost, of_tokens[evicted] + of_bits[paired])
        best = efficient(options)
        units.append(LayerUnit(layer, tuple(priced[n][0] for n in best), options[best]))
    return units


def _priced(
    table: LossTable, candidates: list[Evict], pairs: list[tuple[int, int]], budget: Budget, window: Window
) -> Iterator[tuple[Stored, int, int, int]]:
    """Each choice with the number of its eviction (0: none), that of its pair of formats, and its bytes."""
    model, size = table.model, itemsize(budget.dtype or table.model.dtype)
    heads, dim, tokens = model.num_kv_heads, model.head_dim, budget.tokens
    for pair, (k, v) in enumerate(pairs):
        key, value = table.key_specs[k], table.value_specs[v]
        whole = LayerPlan(layers=0, key=key, value=value, window=window)
        page_tokens = head_layouts(whole, heads, dim, size)[0].page_tokens
        yield Stored(None, key, value), 0, pair, layer_nbytes(whole, heads, dim, budget.batch, tokens, size)
        for n, candidate in enumerate(candidates, start=1):
            evict = _in_pages(candidate, tokens, window, page_tokens)
            entry = whole.model_copy(update={"evict": evict})
            room = room_of(entry, heads, dim, (0, 1))
            assert room is not None
            if room.limit(tokens) == evict.budget < tokens:  # else more is never evicted, or nothing has to go
                nbytes = layer_nbytes(entry, heads, dim, budget.batch, room.limit(tokens), size, room, tokens)
                yield Stored(evict, key, value), n, pair, nbytes


def _in_pages(candidate: Evict, tokens: int, window: Window, page_tokens: int) -> Evict:
    """The candidate with its share in tokens that fill pages."""
    exact = window.sinks + window.recent
    pages = max(0, round((candidate.budget * tokens - exact) / page_tokens))
    return candidate.model_copy(update={"budget": max(1, exact + pages * page_tokens)})
