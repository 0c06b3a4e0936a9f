"""How many sequences fit in a GPU's memory: by arithmetic, then by allocating them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

from kvloom.bench._grid import Shape
from kvloom.bench.generation._lineup import Lineup
from kvloom.bench.generation._measure import Job, survives, weight_nbytes
from kvloom.bench.generation._memory import attempt, largest
from kvloom.cache import fixed_nbytes
from kvloom.errors import DataError
from kvloom.evaluate import Contestant, Progress, silent
from kvloom.plan import Fingerprint, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RESERVE = 1 << 30
"""Bytes for what no formula tells: the CUDA context, kernels and their workspace, gaps between blocks."""

DENSE = "uncompressed"
_NEW_TOKENS = 2


@dataclass(frozen=True)
class Fit:
    """What fits under one plan.

    Attributes:
        name: Of the plan, or `DENSE`.
        sequence_nbytes: Bytes of a cache of one sequence.
        true_bits: 8 x bytes / cached elements of the full-attention layers, of as many sequences as are predicted.
        predicted: Sequences, by arithmetic.
        verified: Sequences that were allocated and decoded; None if nobody tried.
    """

    name: str
    sequence_nbytes: int
    true_bits: float
    predicted: int
    verified: int | None = None


@dataclass(frozen=True)
class Capacity:
    """How a GPU's memory is spent.

    Attributes:
        memory: Bytes of the GPU.
        reserve: Bytes left alone, see `RESERVE`.
        weight_nbytes: Bytes of the weights.
        step_nbytes: Bytes of one sequence's activations in a decode step.
        tokens: Tokens of each sequence.
        dtype: Compute dtype.
        fits: The uncompressed cache, then every plan.
    """

    memory: int
    reserve: int
    weight_nbytes: int
    step_nbytes: int
    tokens: int
    dtype: torch.dtype
    fits: tuple[Fit, ...]


def fit(
    config: PreTrainedConfig,
    plans: Mapping[str, Plan],
    *,
    memory: int,
    tokens: int,
    dtype: torch.dtype,
    reserve: int = RESERVE,
) -> Capacity:
    """Predict how many sequences fit: weights, a decode step's activations and the caches, by exact bytes of each.

    Caches are of fixed size (`StaticCache`, and `LoomCache` with ``max_tokens``; growing where a plan's keys are packed
    before RoPE or its policy watches every step): exact windows, sinks, unfilled pages and room to the last token
    count, sliding-window layers too. Where tokens are evicted, all but the last two are the prompt. What passing a
    prompt takes does not count: bring long prompts in chunks (``prefill_chunk_size`` of `generate`).

    Args:
        config: The model's.
        plans: Plans by name.
        memory: Bytes of the GPU.
        tokens: Tokens of each sequence, prompt and generated.
        dtype: Of the weights and of what is computed.
        reserve: See `Capacity`.

    Raises:
        DataError: There are fewer than 2 tokens, or the memory does not hold the weights.
        ModelError: A plan is for another model.
    """
    if tokens < _NEW_TOKENS:
        raise DataError(f"{tokens} tokens: give the tokens of each sequence, 2 at least.")
    for plan in plans.values():
        plan.model.check(Fingerprint.of(config))
    with torch.device("meta"):
        weights = weight_nbytes(AutoModelForCausalLM.from_config(config, dtype=dtype))
    left, step = memory - reserve - weights, step_nbytes(config, tokens, dtype)
    if left < 0:
        raise DataError(
            f"the weights take {weights:,} bytes and {reserve:,} are reserved, but there are {memory:,}: give a larger "
            "--gpu, or a smaller --dtype."
        )
    fits = tuple(_fit(name, plan, config, left, step, tokens, dtype) for name, plan in [(DENSE, None), *plans.items()])
    return Capacity(memory, reserve, weights, step, tokens, dtype, fits)


def cache_nbytes(
    plan: Plan | None, config: PreTrainedConfig, batch: int, tokens: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of a cache of fixed size (growing where `fit` says so): full-attention layers, and sliding-window layers.

    Args:
        plan: What the full-attention layers store; None for `StaticCache`.
        config: The model's.
        batch: Sequences.
        tokens: Tokens of each.
        dtype: Compute dtype.
    """
    shape = Fingerprint.of(config)
    stock = _static_nbytes(config, batch, tokens, dtype)
    packed, others = ({i: n for i, n in stock.items() if (i in shape.packed_layers) is full} for full in (True, False))
    if plan is None:
        full_attention = sum(packed.values())
    else:
        fixed = partial(fixed_nbytes, plan, prompt=max(1, tokens - _NEW_TOKENS))
        full_attention = (plan.nbytes if plan.needs_growing else fixed)(batch, tokens, dtype)
    return full_attention, sum(others.values())


def step_nbytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one sequence takes in a decode step besides its cache, at most at a time.

    Logits, their fp32 copy and the scores made of it; the widest layer (gate, up and their product); eight states
    (residual, norm, queries, keys and values, outputs, ...); a mask of one byte a token.
    """
    text: Any = config.get_text_config(decoder=True)
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    scores = text.vocab_size * (dtype.itemsize + 2 * torch.float32.itemsize)
    return int(scores + (3 * wide + 8 * text.hidden_size) * dtype.itemsize + tokens)


@torch.no_grad()
def verify(
    capacity: Capacity, model: PreTrainedModel, plans: Mapping[str, Plan], progress: Progress = silent
) -> Capacity:
    """Allocate caches around the predicted numbers, fill them with random states, and decode at their full length.

    Steps are not compiled. Where the GPU has more than ``capacity.memory``, the rest is left alone.

    Args:
        capacity: What `fit` predicts for the model and the plans.
        model: The model, on a GPU, with nothing else there.
        plans: The plans by name.
        progress: Told before every plan.

    Raises:
        DataError: The GPU has less memory than that, or the model is not on a GPU.
    """
    device = model.device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if total < capacity.memory:
        raise DataError(
            f"{capacity.memory:,} bytes cannot be allocated on {device}, which has {total:,} of a GPU's: say less as "
            "--gpu, or leave it at what is predicted."
        )
    torch.cuda.set_per_process_memory_fraction((capacity.memory - _context_nbytes(device)) / total, device)
    try:
        done: list[Fit] = []
        contestants = fit_contestants(model, plans, capacity.tokens)
        for row, contestant in zip(capacity.fits, contestants, strict=True):
            progress(f"allocating {row.name}", len(done), len(contestants))
            fits = partial(_fits, model, contestant, capacity.tokens)
            done.append(replace(row, verified=largest(fits, max(1, row.predicted))))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    progress("allocated", len(done), len(done))
    return replace(capacity, fits=tuple(done))


def fit_contestants(model: PreTrainedModel, plans: Mapping[str, Plan], tokens: int) -> list[Contestant]:
    """The caches that `fit` speaks of, in its order."""
    made = Lineup(model, {}, ["static"])(tokens)
    for name, plan in plans.items():
        made += Lineup(model, {name: plan}, ["growing" if plan.needs_growing else "fixed"])(tokens)
    return made


def _fit(
    name: str,
    plan: Plan | None,
    config: PreTrainedConfig,
    left: int,
    step: int,
    tokens: int,
    dtype: torch.dtype,
) -> Fit:
    def bytes_of(batch: int) -> tuple[int, int]:
        return cache_nbytes(plan, config, batch, tokens, dtype)

    predicted = largest(lambda batch: sum(bytes_of(batch)) + batch * step <= left)
    shape, batch = Fingerprint.of(config), max(1, predicted)
    elements = 2 * len(shape.packed_layers) * batch * shape.num_kv_heads * tokens * shape.head_dim
    return Fit(name, sum(bytes_of(1)), 8 * bytes_of(batch)[0] / elements, predicted)


def _static_nbytes(config: PreTrainedConfig, batch: int, tokens: int, dtype: torch.dtype) -> dict[int, int]:
    """Bytes of transformers' layers of fixed size, as they allocate themselves where nothing is allocated."""
    shape, cache = Fingerprint.of(config), StaticCache(config, max_cache_len=tokens)
    states = torch.empty(batch, shape.num_kv_heads, 0, shape.head_dim, dtype=dtype, device="meta")
    sizes: dict[int, int] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, StaticLayer):
            layer.lazy_initialization(states, states)
            sizes[i] = sum(tensor.nbytes for tensor in vars(layer).values() if torch.is_tensor(tensor))
    return sizes


def _context_nbytes(device: torch.device) -> int:
    """Bytes that are in use beside torch's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _fits(model: PreTrainedModel, contestant: Contestant, tokens: int, batch: int) -> bool:
    job = Job(model, _NEW_TOKENS, "random", 1)
    shape = Shape(batch, tokens - _NEW_TOKENS + 1)
    return bool(attempt(partial(survives, job, contestant, shape), model.device))
