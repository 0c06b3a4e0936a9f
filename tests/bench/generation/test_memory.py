from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.generation._memory import attempt, is_out_of_memory, largest

CPU = torch.device("cpu")


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_the_largest_that_fits_is_found_in_few_attempts(limit: int, guess: int):
    tried: list[int] = []

    def fits(number: int) -> bool:
        assert number > 0
        tried.append(number)
        return number <= limit

    assert largest(fits, guess) == limit
    assert len(tried) == len(set(tried))
    assert len(tried) <= 2 * math.log2(abs(limit - guess) + 1) + 3


def test_running_out_of_memory_is_survived_and_nothing_is_kept():
    held = []

    def work() -> None:
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert attempt(work, CPU) is None
    assert held[0]() is None
    assert attempt(lambda: 3, CPU) == 3


def test_other_errors_are_not_hidden():
    def work() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        attempt(work, CPU)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("whatever"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: RuntimeError, is_one: bool):
    assert is_out_of_memory(error) == is_one


@pytest.mark.gpu
def test_memory_that_ran_out_is_free_again():
    device = torch.device("cuda", 0)
    share = 1 << 30
    torch.cuda.set_per_process_memory_fraction(share / torch.cuda.mem_get_info(device)[1], device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)

    def work() -> list[torch.Tensor]:
        return [torch.empty(share // 4, dtype=torch.uint8, device=device) for _ in range(5)]

    try:
        assert attempt(work, device) is None
        assert torch.cuda.memory_reserved(device) <= before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
