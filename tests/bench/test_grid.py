from __future__ import annotations

import pytest
import torch

from kvloom.bench import Pair, Shape, make_grid
from kvloom.errors import PlanError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_words_are_read():
    grid = make_grid(CUDA, shapes="B8x32k, B1x1M,B2x192", pairs="8:8,4:2", heads="40/8", dtype="bf16")
    assert grid.shapes == (Shape(8, 32768), Shape(1, 2**20), Shape(2, 192))
    assert [shape.label for shape in grid.shapes] == ["B8x32K", "B1x1M", "B2x192"]
    assert grid.pairs == (Pair(8, 8), Pair(4, 2))
    assert grid.pairs[1].label == "K4V2"
    assert (grid.query_heads, grid.kv_heads) == (40, 8)
    assert (grid.dtype, grid.dtype_name, grid.itemsize) == (torch.bfloat16, "bfloat16", 2)


def test_a_repeated_case_is_measured_once():
    grid = make_grid(CPU, shapes="B1x512,B1x512", pairs="4:4,4:4")
    assert (len(grid.shapes), len(grid.pairs)) == (1, 1)


def test_a_cpu_has_smaller_defaults():
    small, large = make_grid(CPU), make_grid(CUDA)
    assert max(shape.tokens for shape in small.shapes) < max(shape.tokens for shape in large.shapes)
    assert (small.dtype, large.dtype) == (torch.float32, torch.float16)
    assert Shape(8, 32768) in large.shapes
    assert Pair(1, 1) in large.pairs


def test_a_group_of_128_keys_makes_pages_of_128():
    assert make_grid(CPU, key_group=128).layout(Pair(4, 4)).page_tokens == 128


@pytest.mark.parametrize(
    ("option", "word", "message"),
    [
        ("shapes", "8x32K", "--shapes: cannot read '8x32K'"),
        ("shapes", "B8x32G", "--shapes B8x32G: cannot read '32G'"),
        ("shapes", "B1x1000", "--shapes B1x1000: give a batch above 0, and tokens in whole pages of 64"),
        ("shapes", "B0x64", "--shapes B0x64"),
        ("pairs", "4-4", "--pairs: cannot read '4-4'; give two numbers as in 4:2"),
        ("pairs", "7:4", "--pairs 7:4: 7 bits is not one of 1, 2, 3"),
        ("heads", "32", "--heads: cannot read '32'"),
        ("heads", "32/5", "--heads 32/5: query heads must be a multiple of KV heads"),
        ("heads", "32/0", "--heads 32/0"),
        ("dtype", "int8", "dtype 'int8' is not known: give one of float16"),
        ("window", -1, "--window -1"),
        ("head_dim", 100, "--head-dim 100"),
        ("key_group", 48, "--key-group 48"),
    ],
)
def test_mistakes_name_the_option(option: str, word: object, message: str):
    with pytest.raises(PlanError) as failed:
        make_grid(CPU, **{option: word})
    assert str(failed.value).startswith(message) or message in str(failed.value)
    assert "\n" not in str(failed.value)
