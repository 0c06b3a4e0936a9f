"""One cache under one load: a few tokens to warm up and to compile, then timed generations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from kvloom._processes import local_tensor
from kvloom.bench._ceilings import Ceilings
from kvloom.bench._figures import rates, times_bound
from kvloom.bench._grid import Shape
from kvloom.bench.generation._fill import fill_random
from kvloom.bench.generation._steps import StepTimes
from kvloom.cache import LoomCache, local_shape
from kvloom.evaluate import Contestant, Record, attention, check_multiple, live_bytes
from kvloom.generation import decode_loop

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Fill = Literal["prompt", "random"]

WARM_UP_TOKENS = 8
_TRIAL_TOKENS = 2
_SEED = 0


@dataclass(frozen=True)
class Job:
    """What is done with every cache.

    Attributes:
        model: A causal language model in evaluation mode.
        new_tokens: Generated tokens, 2 at least; the first is the prompt's, the others are decoded.
        fill: ``prompt``: random token ids pass through the model, and their time is taken; ``random``: caches are
            filled with normal keys and values.
        repeats: Timed generations.
    """

    model: PreTrainedModel
    new_tokens: int
    fill: Fill
    repeats: int


@torch.no_grad()
def measure(job: Job, contestant: Contestant, shape: Shape, ceilings: Ceilings) -> Record:
    """Time and memory of one cache.

    `tokens_per_s` is all decoded tokens over all decode time, `seconds` the median step. The bound is the time that
    reading all weights and the live cache once takes at the measured bandwidth; of a sharded model it is all about this
    process's part, but for the tokens. `start_bytes` are allocated before
    there is a cache, `peak_bytes` is the most while prompts were passed and tokens decoded (None on a CPU).

    Args:
        job: What is done.
        contestant: Whose cache; made for `room` tokens if its size is fixed.
        shape: Sequences and prompt tokens.
        ceilings: The device's measured rates.

    Raises:
        DataError: The cache cannot compress prompts of that length.
    """
    check_multiple(contestant, "prompt", shape.tokens)
    torch.compiler.reset()  # after eight sizes of cache torch compiles no more for a model, and runs it as it is
    model, first, steps = job.model, [], []
    options = _options(contestant)
    start = _allocated(model.device)
    with attention(model, packed=contestant.plan is not None), _plain_generation(model):
        cache = contestant.make_cache()
        _run(job, cache, shape, min(WARM_UP_TOKENS, job.new_tokens), options)
        peaks = []
        for _ in range(job.repeats):
            if cache.is_compileable:
                cache.reset()  # the tensors that the compiled step knows
            else:
                cache = contestant.make_cache()
            times, peak = _run(job, cache, shape, job.new_tokens, options)
            first.append(times.first())
            steps += times.steps()
            peaks.append(peak)
        compiled = cache.is_compileable and model.device.type == "cuda"
    live, weights = live_bytes(contestant, cache, local_shape(model)), weight_nbytes(model)
    timing = times.timing(steps)
    return {
        "batch": shape.batch,
        "compiled": compiled,
        "prefill_s": median(first) if job.fill == "prompt" else None,
        "tokens_per_s": shape.batch * len(steps) / sum(steps),
        **rates(timing, weights + live, ceilings),
        "times_bound": times_bound(timing, weights + live, ceilings),
        "bound_s": (weights + live) / ceilings.read,
        "weight_bytes": weights,
        "live_bytes": live,
        "true_bits": 8 * live / _elements(model, shape.batch, int(cache.get_seq_length())),
        "start_bytes": start,
        "peak_bytes": max(peaks) if start is not None else None,
    }


@torch.no_grad()
def survives(job: Job, contestant: Contestant, shape: Shape) -> bool:
    """Go where memory is scarcest, without compiling: through the prompt if it is real, and to the last tokens.

    Returns:
        True.

    Raises:
        torch.OutOfMemoryError: There is not enough.
    """
    most = shape.tokens + job.new_tokens - _TRIAL_TOKENS - 1
    full = Shape(shape.batch, most - most % contestant.token_multiple)
    ends = [(Job(job.model, _TRIAL_TOKENS, "random", 1), full)]
    if job.fill == "prompt":
        ends.insert(0, (job, shape))
    with attention(job.model, packed=contestant.plan is not None), _plain_generation(job.model):
        for end, size in ends:
            _run(end, contestant.make_cache(), size, _TRIAL_TOKENS, {**_options(contestant), "disable_compile": True})
    return True


def room(load_tokens: int, new_tokens: int) -> int:
    """Tokens that a cache of fixed size has room for: a prompt, whatever its fill, and what is generated."""
    return load_tokens + new_tokens


def weight_nbytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights in this process, each counted once."""
    return sum(local_tensor(weight).nbytes for weight in model.parameters())


def _options(contestant: Contestant) -> dict[str, Any]:
    """What `generate` is told of a contestant."""
    return {"custom_generate": decode_loop} if contestant.method == "loop" else {}


def _run(job: Job, cache: Cache, shape: Shape, new_tokens: int, options: dict[str, Any]) -> tuple[StepTimes, int]:
    """Bring the prompt into an empty cache and generate; the times, and the most bytes allocated from then on."""
    model: Any = job.model
    if job.fill == "random":
        fill_random(cache, model, shape.batch, shape.tokens)
    ids = _token_ids(model, shape.batch, shape.tokens + (job.fill == "random"))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    times = StepTimes(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=[times],
        **options,
    )
    if isinstance(cache, LoomCache):
        cache.check()
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0
    return times, peak


def _token_ids(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator(model.device).manual_seed(_SEED)  # processes that share a model read the same tokens
    return torch.randint(vocabulary, (batch, tokens), generator=generator, device=model.device)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Generate so many tokens and no fewer: nothing of the model's own settings, which may end a text, applies."""
    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = before


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _elements(model: PreTrainedModel, batch: int, tokens: int) -> int:
    """Cached numbers of the full-attention layers."""
    shape = local_shape(model)
    return 2 * len(shape.packed_layers) * batch * shape.num_kv_heads * tokens * shape.head_dim
