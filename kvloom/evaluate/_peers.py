"""The incumbents: transformers' `QuantizedCache` on the quanto and hqq backends.

Each comes in two configurations. `as it comes` is the class's default, axis 0 for keys and values.
`best axes` is what measures best: quanto with keys per channel (`axis_key=-1`) and values per
token, hqq with `axis=1`. Both backends quantise the whole first update, gather later tokens exactly
until there are 128, then dequantise, join and quantise everything again.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import QuantizedCache

from kvloom._extras import missing, pip_command
from kvloom.cache import local_shape
from kvloom.evaluate._contestants import Contestant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 64
BITS = (4, 2)
RESIDUAL = 128


@dataclass(frozen=True)
class Configuration:
    """Axes of a backend's keys and values, in the backend's own sense of the word, and the widths it takes there."""

    label: str
    axis_key: int
    axis_value: int
    widths: tuple[int, ...]


LABELS = AS_IT_COMES, BEST_AXES = ("as it comes", "best axes")
BACKENDS: dict[str, tuple[Configuration, ...]] = {
    "quanto": (Configuration(AS_IT_COMES, 0, 0, (2, 4)), Configuration(BEST_AXES, -1, 0, (2, 4))),
    "hqq": (Configuration(AS_IT_COMES, 0, 0, (1, 2, 3, 4, 8)), Configuration(BEST_AXES, 1, 1, (1, 2, 4, 8))),
}
"""On axis 1 hqq 0.2.8 decodes 3-bit codes (ten in 32 bits) of matrices only, and a cache has four dimensions."""


@dataclass(frozen=True)
class Peers:
    """Contestants that can run here, and a sentence on each backend that cannot."""

    contestants: tuple[Contestant, ...]
    notes: tuple[str, ...]


def peer_contestants(
    model: PreTrainedModel,
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = (GROUP,),
    labels: Sequence[str] = LABELS,
) -> Peers:
    """`QuantizedCache` on every backend that works on this machine.

    The first use of quanto on a machine builds a C++ extension, for about a minute.

    Args:
        model: the model the caches serve.
        bits: widths of the codes; those that a backend cannot have are left out.
        groups: elements that share a scale and a zero point.
        labels: which configurations.
    """
    contestants: list[Contestant] = []
    notes: list[str] = []
    for backend, configurations in BACKENDS.items():
        problem = why_not(backend, model)
        if problem:
            notes.append(problem)
            continue
        contestants += [
            quantized_contestant(model, backend, configuration, width, group)
            for configuration in configurations
            for width in bits
            if configuration.label in labels and width in configuration.widths
            for group in groups
        ]
    return Peers(tuple(contestants), tuple(notes))


def quantized_contestant(
    model: PreTrainedModel, backend: str, configuration: Configuration, bits: int, group: int = GROUP
) -> Contestant:
    """`QuantizedCache` in one configuration, residual 128 as it comes."""
    options: dict[str, int] = {
        "nbits": bits,
        "axis_key": configuration.axis_key,
        "axis_value": configuration.axis_value,
        "q_group_size": group,
        "residual_length": RESIDUAL,
    }
    whole_groups = backend == "quanto" and -1 in (configuration.axis_key, configuration.axis_value)
    heads = local_shape(model).num_kv_heads
    name = f"{backend} {bits}b, {configuration.label}"
    return Contestant(
        name=name if group == GROUP else f"{name}, groups of {group}",
        method=backend,
        target_bits=None,
        make_cache=lambda: QuantizedCache(backend, model.config, **options),
        settings={"backend": backend, **options},
        token_multiple=group // math.gcd(group, heads) if whole_groups else 1,
        exact_tail=RESIDUAL,
    )


def why_not(backend: str, model: PreTrainedModel) -> str | None:
    """Why a backend has no row here, in one sentence; None when it works.

    Tries a small cache, which also builds what the backend builds on its first use.
    """
    if absent := missing(backend):
        return (
            f"QuantizedCache on {backend} is left out: {' and '.join(absent)} not installed, run "
            f"{pip_command(backend)}."
        )
    first = BACKENDS[backend][0]
    shape = local_shape(model)
    states = torch.linspace(-1, 1, shape.num_kv_heads * GROUP * shape.head_dim, dtype=model.dtype)
    states = states.view(1, shape.num_kv_heads, GROUP, shape.head_dim).to(model.device)
    try:
        with _programs_of_this_environment():
            cache = quantized_contestant(model, backend, first, BITS[0]).make_cache()
            for _ in range(2):
                cache.update(states, states, 0)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        return f"QuantizedCache on {backend} is left out: it does not work here ({reason})."
    return None


@contextmanager
def _programs_of_this_environment() -> Iterator[None]:
    """Put this Python's own programs (ninja, which quanto's build calls) on the search path."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
