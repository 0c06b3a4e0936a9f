"""Attention that keeps what a measurement needs, and tells packed tokens from exact ones.

A query of a decoding step sees most of its past from packed pages and the rest (sinks, newest tokens)
exactly. The tap reproduces that split in one ordinary forward pass over a whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kvloom.errors import ModelError
from kvloom.plan import Window, full_pages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TAP = "kvloom_tap"
"""Name under which the tapped attention is registered with transformers."""

Store = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(layer, key, value)` to what they read back as from pages, `[batch, kv_heads, tokens, head_dim]`."""

_BARRIER = -1e30
"""Added to scores a query may not see: their exponential is 0, and a row of nothing else stays finite."""

_EXACT_QUERIES = {"cpu": 64}
"""Queries whose scores exist at a time where nothing is packed: few enough that they stay in a CPU's caches."""

_MANY_EXACT_QUERIES = 512
"""Elsewhere: a GPU works on small pieces faster than they can be launched."""

_active: ContextVar[Attends | None] = ContextVar("kvloom_active_tap", default=None)


class Attends(Protocol):
    """What the tapped attention of a model goes through."""

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attention output of a grouped query, `[batch, kv_heads, group, tokens, head_dim]`, shaped like it."""


A = TypeVar("A", bound=Attends)


@dataclass(frozen=True)
class Run:
    """Queries `start..stop-1`, all of which see the tokens `first..last-1` as packed."""

    start: int
    stop: int
    first: int
    last: int


def packed_end(query: int, window: Window, page_tokens: int) -> int:
    """End of the tokens that the query at 0-based position `query` sees packed; the sinks precede them.

    Only full pages are packed, before the exact recent tokens, as in token-by-token decoding.
    """
    return window.sinks + page_tokens * full_pages(window, query, page_tokens)


def packed_runs(tokens: int, window: Window, page_tokens: int) -> list[Run]:
    """Splits `tokens` queries into runs that see the same packed tokens."""
    ends = [packed_end(query, window, page_tokens) for query in range(tokens)]
    starts = [0] + [query for query in range(1, tokens) if ends[query] != ends[query - 1]]
    stops = [*starts[1:], tokens]
    return [Run(start, stop, window.sinks, ends[start]) for start, stop in zip(starts, stops, strict=True)]


def exact_runs(tokens: int, device: torch.device) -> list[Run]:
    """Splits `tokens` queries into runs that see no packed tokens."""
    step = _EXACT_QUERIES.get(device.type, _MANY_EXACT_QUERIES)
    return [Run(start, min(start + step, tokens), 0, 0) for start in range(0, tokens, step)]


@dataclass(frozen=True)
class Scoring:
    """How one layer turns products of queries and keys into probabilities.

    Attributes:
        scale: Factor of the products.
        mask: bool `[batch, 1, queries, keys]`, True where a query may look; None is causal.
        softcap: Bound of the scores, approached by tanh, or None.
        sink_logits: `[heads]`, a score of each head that takes probability and gives nothing, or None.
    """

    scale: float
    mask: Tensor | None
    softcap: float | None
    sink_logits: Tensor | None

    def probabilities(self, query: Tensor, key: Tensor, start: int) -> Tensor:
        """Float32 weights `[batch, kv_heads, group, queries, keys]`.

        Args:
            query: `[batch, kv_heads, group, queries, head_dim]`, the first at position `start`.
            key: `[batch, kv_heads, keys, head_dim]`, all keys up to the last query.
            start: Position of the first query.
        """
        scores = grouped_matmul(query, key.transpose(-1, -2)).float()
        allowed = self._allowed(query.shape[-2], key.shape[-2], start, query.device)
        barrier = torch.where(allowed, 0.0, _BARRIER)
        if self.softcap is None:
            scores = torch.add(barrier, scores, alpha=self.scale)
        else:
            scores = barrier + self.softcap * torch.tanh(scores * (self.scale / self.softcap))
        if self.sink_logits is not None:
            sinks = self.sink_logits.float().view(1, *query.shape[1:3], 1, 1)
            scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[-2]]
        # A query that may look nowhere (padding) has equal weights here and must have none.
        return weights if self.mask is None else weights * allowed

    def repeated(self, times: int) -> Scoring:
        """The scoring of a batch that is the old one so many times over."""
        return self if self.mask is None else replace(self, mask=self.mask.repeat(times, 1, 1, 1))

    def _allowed(self, queries: int, keys: int, start: int, device: torch.device) -> Tensor:
        """Bool `[batch or 1, 1, 1, queries, keys]`."""
        if self.mask is not None:
            return self.mask[:, :, None, start : start + queries, :keys]
        position = torch.arange(start, start + queries, device=device)
        return torch.arange(keys, device=device) <= position.view(1, 1, 1, -1, 1)


def grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`[batch, kv_heads, group, n, m] @ [batch, kv_heads, m, k]`, the right side shared by a group."""
    batch, heads, group, n, _ = left.shape
    return (left.reshape(batch, heads, group * n, -1) @ right).view(batch, heads, group, n, -1)


def seen_by(run: Run, exact: Tensor, stored: Tensor) -> Tensor:
    """What the queries of a run see of `[batch, kv_heads, tokens, head_dim]`: packed tokens as stored."""
    if stored is exact or run.last == run.first:
        return exact[:, :, : run.stop]
    before, after = exact[:, :, : run.first], exact[:, :, run.last : run.stop]
    return torch.cat((before, stored[:, :, run.first : run.last], after), dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, start: int, scoring: Scoring) -> Tensor:
    """Output of the queries from position `start`, shaped like them; key and value as they see them."""
    weights = scoring.probabilities(query, key, start)
    return grouped_matmul(weights.to(value.dtype), value)


class _Recomputed(torch.autograd.Function):
    """Attention run by run that keeps no scores: the backward pass computes them again.

    `keep` is called with the gradient by the output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stored: tuple[Tensor, Tensor],
        runs: list[Run],
        scoring: Scoring,
        keep: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scoring, ctx.keep = scoring, keep
        outputs = []
        for run in runs:
            seen = seen_by(run, key, stored[0]), seen_by(run, value, stored[1])
            outputs.append(_attend(query[:, :, :, run.start : run.stop], *seen, run.start, scoring))
        return torch.cat(outputs, dim=3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.keep(gradient)
        query, key, value = ctx.saved_tensors
        return (*_gradients(query, key, value, ctx.scoring, gradient), None, None, None, None)


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value, shaped like them, from the one by the output; all states exact."""
    total = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for run in exact_runs(query.shape[3], query.device):
        rows, seen = slice(run.start, run.stop), slice(run.stop)
        parts = query[:, :, :, rows], key[:, :, seen], value[:, :, seen]
        leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            output = _attend(leaves[0], leaves[1], leaves[2], run.start, scoring)
        by_query, by_key, by_value = torch.autograd.grad(output, leaves, gradient[:, :, :, rows])
        total[0][:, :, :, rows] = by_query
        total[1][:, :, seen] += by_key
        total[2][:, :, seen] += by_value
    return total


@dataclass
class Tapped:
    """One layer's attention in one pass.

    Attributes:
        query: `[batch, kv_heads, group, tokens, head_dim]`, as attended: positions applied.
        key: `[batch, kv_heads, tokens, head_dim]`, as cached.
        value: The same shape, as cached.
        scoring: What lies between scores and probabilities.
        runs: Which tokens each query sees packed.
        gradient: Gradient by the attention's output, shaped like `query`; set by a backward pass.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    runs: list[Run]
    gradient: Tensor | None = None
    _by_states: tuple[Tensor, Tensor] | None = None

    def keep(self, gradient: Tensor) -> None:
        """Takes the gradient by the output."""
        self.gradient, self._by_states = gradient, None

    def state_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients by the keys and by the values, shaped like them, after a backward pass."""
        if self.gradient is None:
            raise RuntimeError("the tapped attention has seen no backward pass")
        if self._by_states is None:
            gradients = _gradients(self.query, self.key, self.value, self.scoring, self.gradient)
            self._by_states = gradients[1:]
        return self._by_states


@dataclass
class Tap:
    """What to tap, and what was caught.

    Attributes:
        layers: Layers whose cache would be packed; the others attend as usual and are not kept.
        window: Tokens the cache keeps exactly.
        page_tokens: Tokens in a page.
        store: What packed tokens read back as, in a forward pass without gradients; None: unchanged.
        caught: What was caught, by layer.
    """

    layers: Collection[int]
    window: Window
    page_tokens: int
    store: Store | None = None
    caught: dict[int, Tapped] = field(default_factory=dict)

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attention output of a grouped query, shaped like it."""
        tokens = query.shape[-2]
        runs, stored, keep = exact_runs(tokens, query.device), (key, value), _forget
        if layer is not None and layer in self.layers:
            packed = packed_runs(tokens, self.window, self.page_tokens)
            caught = Tapped(query.detach(), key.detach(), value.detach(), scoring, packed)
            self.caught[layer] = caught
            if self.store is not None:
                runs, stored = packed, self.store(layer, key, value)
            keep = caught.keep
        output: Tensor = _Recomputed.apply(query, key, value, stored, runs, scoring, keep)  # type: ignore[no-untyped-call]
        return output


def _forget(gradient: Tensor) -> None:
    """Takes a gradient nobody needs."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls, with `[batch, heads, tokens, head_dim]` tensors."""
    tap = _active.get()
    if tap is None:
        raise ModelError(
            f"attn_implementation {TAP!r} only works while a profile is measured; set another such as 'sdpa'."
        )
    if position_bias is not None:
        raise ModelError(
            f"{type(module).__name__} adds a position bias to its scores, which kvloom cannot "
            "profile; choose a model with rotary positions."
        )
    batch, heads, tokens, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], tokens, head_dim)
    scale = head_dim**-0.5 if scaling is None else scaling
    scoring = Scoring(scale, attention_mask, softcap, s_aux)
    output = tap.attend(getattr(module, "layer_idx", None), grouped, key, value, scoring)
    return output.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


@contextmanager
def tapped(model: PreTrainedModel, tap: A) -> Iterator[A]:
    """Sends the model's attention through the tap; the model is as before at the end.

    Raises:
        ModelError: The model does not use transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(TAP, _attention)
    AttentionMaskInterface.register(TAP, sdpa_mask)
    before = _implementations(model.config)
    token = _active.set(tap)
    try:
        model.set_attn_implementation(TAP)
        if model.config._attn_implementation != TAP:
            raise ModelError(
                f"{type(model).__name__} does not use transformers' attention interface, "
                "so its attention cannot be measured; choose another model."
            )
        yield tap
    finally:
        model.set_attn_implementation(before)
        _active.reset(token)


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """Attention implementation of a config (under "") and of each of its sub-configs."""
    nested = {name: getattr(config, name, None) for name in config.sub_configs}
    below = {name: _implementations(sub) for name, sub in nested.items() if sub is not None}
    return {"": config._attn_implementation, **below}
