"""One vocabulary: whoever takes a word for a dtype takes all of them."""

from __future__ import annotations

import pytest
import torch

from kvloom import Budget, Fingerprint
from kvloom._dtypes import dtype_name, torch_dtype
from kvloom.bench import make_grid
from kvloom.errors import PlanError
from kvloom.plan import itemsize
from kvloom.sweep import ModelEntry

WORDS = {
    torch.float16: ("float16", "fp16", "half", "FP16", "torch.float16", torch.float16),
    torch.bfloat16: ("bfloat16", "bf16", "BF16", torch.bfloat16),
    torch.float32: ("float32", "fp32", "float", torch.float32),
}
CASES = [(word, dtype) for dtype, words in WORDS.items() for word in words]


@pytest.mark.parametrize(("word", "dtype"), CASES)
def test_every_usual_word_is_read(word: object, dtype: torch.dtype):
    assert torch_dtype(word) is dtype
    assert itemsize(word) == dtype.itemsize
    assert f"torch.{dtype_name(word)}" == str(dtype)


@pytest.mark.parametrize(("word", "dtype"), [case for case in CASES if isinstance(case[0], str)])
def test_every_door_takes_every_word_and_keeps_the_canonical_one(word: str, dtype: torch.dtype):
    shape = {"architecture": "x", "num_layers": 1, "packed_layers": [0], "num_kv_heads": 1, "head_dim": 64}
    name = str(dtype).removeprefix("torch.")
    assert make_grid(torch.device("cpu"), dtype=word).dtype is dtype
    assert Budget.bits(3, 2048, dtype=word).dtype == name
    assert Fingerprint(**shape, dtype=word).dtype == name
    assert ModelEntry(model="x", dtype=word).dtype == name


@pytest.mark.parametrize("word", ["fp8", "int8", "auto", "", "16", torch.int8])
def test_another_word_is_refused_with_those_there_are(word: object):
    with pytest.raises(PlanError, match=r"is not known: give one of float16, bfloat16, float32, float64\.$"):
        dtype_name(word)
