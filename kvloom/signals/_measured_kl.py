"""Measured KL divergence, one unit and one format at a time: what the other signals try to predict.

One layer's keys or values (or those of one KV head) are read as stored, everything else exactly, and the next-token
distributions are compared with the exact ones over the whole vocabulary: a forward pass for every layer, side and
format. A query sees the packed copies of the tokens that a cache decoding token by token would have packed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from kvloom.pages import Format
from kvloom.signals._base import SIDES, ModelSignal, Scores, Side
from kvloom.signals._measure import Meter, at_rest, logits_of
from kvloom.signals._pieces import Pieces
from kvloom.signals._prompts import Prompts
from kvloom.signals._stored import as_read
from kvloom.signals._tap import Store, Tap, tapped

_ROWS = 256
"""Rows of logits compared in float64 at a time."""


class MeasuredKL(ModelSignal):
    """Nats of KL divergence per scored token of storing one unit.

    Args:
        name: Name of the signal.
        by_head: A unit is a KV head's keys or values, not a layer's.
    """

    def __init__(self, name: str, by_head: bool) -> None:
        self.name = name  # type: ignore[misc]  # one class, a signal for each size of a unit
        self._by_head = by_head

    def steps(self, meter: Meter) -> int:
        """One for each layer's keys, and values."""
        return len(SIDES) * len(meter.layers)

    def measure(self, meter: Meter, prompts: Prompts, pieces: Pieces, step: Callable[[], None]) -> Scores:
        """See `ModelSignal.measure`; nats per scored token."""
        model = _Replayed(meter, prompts)
        every = list(range(meter.shape.num_kv_heads))
        heads = [[head] for head in every] if self._by_head else [every]
        found: Scores = {}
        for side in SIDES:
            rows = []
            for layer in meter.layers:
                unit = {**prompts.identity, "side": side, "layer": layer}
                piece = pieces.get(unit, partial(_unit, model, layer, side, heads))
                rows.append(piece["kl"])
                step()
            found[side] = torch.stack(rows, dim=1)
        return found


def _unit(model: _Replayed, layer: int, side: Side, heads: list[list[int]]) -> dict[str, Tensor]:
    """`[batch, heads, formats]`."""
    formats = model.meter.formats[side]
    rows = [torch.stack([model.divergence(layer, side, fmt, own) for fmt in formats], dim=1) for own in heads]
    return {"kl": torch.stack(rows, dim=1)}


class _Replayed:
    """Prompts read once exactly, and again with something stored."""

    def __init__(self, meter: Meter, prompts: Prompts) -> None:
        self.meter = meter
        self._prompts = prompts

    @cached_property
    def _exact(self) -> Tensor:
        return self._logits(None)

    @torch.no_grad()
    def _logits(self, store: Store | None) -> Tensor:
        meter = self.meter
        tap = Tap(meter.layers, meter.window, meter.page_tokens, store)
        with at_rest(meter.model), tapped(meter.model, tap):
            return logits_of(meter.model, self._prompts)

    def divergence(self, layer: int, side: Side, fmt: Format, heads: list[int]) -> Tensor:
        """Mean KL divergence of each prompt, float32 `[batch]`, when these heads are read as stored."""
        exact = self._exact

        def store(at: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            if at != layer:
                return key, value
            states = key if side == "key" else value
            read = as_read(states, self.meter.packed, fmt, self.meter.rope if side == "key" else None).to(states.dtype)
            mixed = states.clone()
            mixed[:, heads] = read[:, heads]
            return (mixed, value) if side == "key" else (key, mixed)

        return self._mean_kl(exact, self._logits(store))

    def _mean_kl(self, exact: Tensor, logits: Tensor) -> Tensor:
        scored = self._prompts.scored.to(exact.device)
        total = torch.zeros(len(exact), dtype=torch.float64, device=exact.device)
        for start in range(0, exact.shape[1], _ROWS):
            rows = slice(start, start + _ROWS)
            dense, other = (x[:, rows].double().log_softmax(dim=-1) for x in (exact, logits))
            divergence = (dense.exp() * (dense - other)).sum(dim=-1).clamp_min(0)
            total += (divergence * scored[:, rows]).sum(dim=1)
        return (total / scored.sum(dim=1)).float().cpu()
