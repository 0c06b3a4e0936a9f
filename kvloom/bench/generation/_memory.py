"""Running out of memory, and going on; the most that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """What `work` returns, or None if it ran out of memory; what it held is given back either way."""
    result = None
    try:
        result = work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release(device)  # after the handler, whose traceback keeps the work's tensors
    return result


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own error, or those of libraries that allocate beside it."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def release(device: torch.device) -> None:
    """Give back what nobody holds: garbage, compiled graphs with their memory, the allocator's free blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def largest(fits: Callable[[int], bool], guess: int = 1) -> int:
    """The largest number that fits, 0 if none does: steps from a guess that double, then bisection.

    Args:
        fits: Whether a positive number fits; if one does, every smaller one is taken to.
        guess: A positive number near the answer saves attempts.
    """
    step = 1
    if fits(guess):
        low = guess
        while fits(low + step):
            low, step = low + step, 2 * step
        high = low + step
    else:
        high = guess
        while high > step and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(0, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
