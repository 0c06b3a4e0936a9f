"""The pass of one token of every sequence, with inputs and outcome in tensors that stay: what a graph can replay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from kvloom import kernels
from kvloom.cache import LoomCache, StepLayer
from kvloom.generation._gates import JoinGates
from kvloom.generation._norms import JoinNorms
from kvloom.generation._passes import Passes
from kvloom.generation._products import JoinProducts
from kvloom.generation._ropes import JoinRopes
from kvloom.generation._sums import SumRanks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASSES = Passes(JoinProducts(), SumRanks(), JoinGates(), JoinNorms(), JoinRopes())
_LIMIT = 1 << 16
# Calls before the graph is captured: the first compiles, the second is watched for waits.
_PLAIN_CALLS = 2

_steps: WeakKeyDictionary[LoomCache, Step] = WeakKeyDictionary()


class Step:
    """One decode step; the first two calls run the model, later ones replay a CUDA graph of it where there can be one.

    Steps that `LoomCache.waits_at` names are no part of the graph: the model runs. It does at every step, too, where
    layers lie on several devices, of which a graph captures one.

    Args:
        model: A causal language model.
        cache: A `LoomCache` of fixed size that holds the prompt.
        pads: bool `[batch, tokens]`, True where a prompt is padded; False beyond them.
        scores: float32 `[batch, vocabulary]`, of the prompt.
        compiled: Whether torch compiles the pass.

    Attributes:
        token: int64 `[batch, 1]`, to be written before a call.
        position: int64 `[batch, 1]`, the token's; a call adds 1.
        scores: float32 `[batch, vocabulary]`, of the next token, after a call.
    """

    def __init__(self, model: PreTrainedModel, cache: LoomCache, pads: Tensor, scores: Tensor, compiled: bool) -> None:
        batch, device = pads.shape[0], model.device
        self._is_padded = bool(pads.any())
        mask_shape = (batch, 1, 1, int(cache.max_tokens or 0) if self._is_padded else 0)
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self._mask = torch.ones(mask_shape, dtype=torch.bool, device=device)
        self.scores = torch.empty_like(scores)
        self._forward: Callable[..., Any] = _compiled_call(model) if compiled else model
        self._inputs = {
            "input_ids": self.token,
            "position_ids": self.position,
            "attention_mask": self._mask,
            "use_cache": True,
        }
        for tensor in (self.token, self.position, self._mask, self.scores):
            torch._dynamo.mark_static_address(tensor)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._waits = not _is_one_gpu({device, *(store.device for store in _stores(cache))})
        self._calls = 0
        self._of = model, compiled
        self._stores = [ref(store) for store in _stores(cache)]
        self.start(cache, pads)

    def start(self, cache: LoomCache, pads: Tensor) -> None:
        """Begin behind another prompt; see the class."""
        self._tokens = int(cache.get_seq_length())
        if self._is_padded:
            self._mask.fill_(True)
            self._mask[:, 0, 0, : pads.shape[1]] = ~pads

    def fits(self, model: PreTrainedModel, cache: LoomCache, pads: Tensor, compiled: bool) -> bool:
        """Whether this is the step of these: a graph writes to the tensors that layers had when it was captured."""
        same = self._of == (model, compiled) and len(self.token) == len(pads) and self._is_padded == bool(pads.any())
        return same and all(known() is now for known, now in zip(self._stores, _stores(cache), strict=True))

    def __call__(self, cache: LoomCache) -> None:
        """Read `token` at `position`, append it to the cache, and set `scores`."""
        with torch.cuda.device_of(self.token):  # graphs are of the current device
            if self._waits or cache.waits_at(self._tokens):
                self._run(cache)
            else:
                with nullcontext() if cache.is_graph_safe else kernels.between_pages():
                    self._replay(cache)
        self._tokens += 1

    def _replay(self, cache: LoomCache) -> None:
        """The steps that are alike."""
        if self._graph is None and self._calls >= _PLAIN_CALLS:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run(cache)
        if self._graph is not None:
            self._graph.replay()
        elif self._calls < _PLAIN_CALLS - 1:
            self._run(cache)
        else:
            with _watched() as waits:
                self._run(cache)
            self._waits = bool(waits)
            if waits:
                warnings.warn(f"decoding is not replayed as a CUDA graph: {waits[0].message}", stacklevel=3)
        self._calls += 1

    def _run(self, cache: LoomCache) -> None:
        with _compiles_anew() if self._of[1] else nullcontext():
            logits = self._forward(**self._inputs, past_key_values=cache).logits
        self.scores.copy_(logits[:, -1])
        self.position += 1


def step_of(model: PreTrainedModel, cache: LoomCache, pads: Tensor, scores: Tensor, compiled: bool) -> Step:
    """The step of this cache, from an earlier generation if its tensors are still the same ones."""
    known = _steps.get(cache)
    if known is not None and known.fits(model, cache, pads, compiled):
        known.start(cache, pads)
        return known
    made = _steps[cache] = Step(model, cache, pads, scores, compiled)
    return made


def _stores(cache: LoomCache) -> list[Any]:
    return [layer.store for layer in cache.layers if isinstance(layer, StepLayer)]


def _is_one_gpu(devices: set[torch.device]) -> bool:
    return len(devices) == 1 and all(device.type == "cuda" for device in devices)


def _compiled_call(model: Any) -> Callable[..., Any]:
    """The model's compiled pass, which it holds itself: both are freed together."""
    if not hasattr(model, "_kvloom_compiled_call"):
        options: dict[str, str | int | bool | Callable[..., Any]] = {
            "post_grad_custom_pre_pass": _PASSES,
            # Kernels of torch's that begin early count on older launches having ended; ours let them begin before.
            "triton.enable_pdl": False,
        }
        model._kvloom_compiled_call = torch.compile(model.__call__, dynamic=False, options=options)
    compiled: Callable[..., Any] = model._kvloom_compiled_call
    return compiled


def _compiles_anew() -> AbstractContextManager[None]:
    """The pass is compiled for every cache of another size or plan; torch gives up after eight and runs it as it is."""
    patch: AbstractContextManager[None] = cast(Any, torch._dynamo.config).patch(
        recompile_limit=_LIMIT, accumulated_recompile_limit=_LIMIT
    )
    return patch


@contextmanager
def _watched() -> Iterator[list[warnings.WarningMessage]]:
    """Collects torch's warnings of waits for the device; it knows its own."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        caught.clear()  # the mode announces itself as a prototype
        waits: list[warnings.WarningMessage] = []
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += [it for it in caught if "synchroniz" in str(it.message)]
