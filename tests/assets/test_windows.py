from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.assets import EVALUATION, Text, texts, token_windows
from kvloom.errors import DataError


class Characters:
    """A tokenizer: one token a character, and a beginning-of-sequence token if it has an id."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True):
        start = [self.bos_token_id] if self.bos_token_id is not None and add_special_tokens else []
        return SimpleNamespace(input_ids=start + [ord(char) for char in text])


def numbered(*lengths: int) -> list[Text]:
    """Texts whose tokens are 1000, 1001, ... without repetition."""
    chars = iter(range(1000, 1000 + sum(lengths)))
    return [Text("t", "".join(chr(next(chars)) for _ in range(length))) for length in lengths]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    window=st.integers(2, 12),
    seed=st.integers(0, 9),
    bos=st.sampled_from([None, 1]),
)
def test_all_windows_tile_the_joined_texts(lengths: list[int], window: int, seed: int, bos: int | None):
    body = window - (bos is not None)
    count = sum(lengths) // body
    if count == 0:
        return
    windows = token_windows(Characters(bos), numbered(*lengths), window, count, seed)
    assert windows.shape == (count, window)
    assert windows.dtype == torch.int64
    assert windows[:, window - body :].flatten().tolist() == [*range(1000, 1000 + count * body)]
    if bos is not None:
        assert (windows[:, 0] == bos).all()


def test_the_seed_chooses_whole_windows_without_repetition():
    everything = token_windows(Characters(), numbered(30, 70), 5, 20, seed=0).tolist()
    first, again, other = (token_windows(Characters(), numbered(30, 70), 5, 6, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(row) for row in first}) == 6
    assert all(row in everything for row in first)
    assert first == sorted(first)


@pytest.mark.parametrize(("window", "count"), [(5, 5), (25, 1), (0, 1), (5, 0), (-3, 1)])
def test_too_little_text_or_nothing_asked_for(window: int, count: int):
    with pytest.raises(DataError, match=f"{count} windows of {window} tokens .* hold 24 tokens"):
        token_windows(Characters(), numbered(24), window, count, seed=0)


def test_essays_suffice_for_sixteen_thousand_scored_tokens(smollm2):
    windows = token_windows(smollm2[1], texts(EVALUATION), 2048, 16, seed=0)
    assert windows.shape == (16, 2048)
    assert windows.max() < smollm2[0].config.vocab_size


def test_all_windows_can_be_asked_for():
    every = token_windows(Characters(), numbered(30, 25), 10, None, seed=3)
    assert torch.equal(every, token_windows(Characters(), numbered(30, 25), 10, 5, seed=0))
    with pytest.raises(DataError, match="1 windows of 10 tokens were asked for"):
        token_windows(Characters(), numbered(4), 10, None, seed=0)
