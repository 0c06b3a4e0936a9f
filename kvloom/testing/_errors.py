"""How far decoded elements may be from what was encoded, and what has no code at all."""

from __future__ import annotations

import torch

from kvloom.codecs import Codec
from kvloom.errors import CacheError
from kvloom.pages import Format
from kvloom.testing._samples import pages

SIZES = (1.0, 1e-3, 1e-6, 20.0, 0.1, 0.01)
OFFSETS = (0.0, 0.0, 0.0, 0.0, 100.0, -3.0)
CONSTANTS = (0.0, 1.0, -3.25, 0.1, 1234.5, -1e-9)
LARGE = 6e4
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def check_bound(codec: Codec, fmt: Format) -> None:
    """No element of ordinary, small, large or far-off groups is stored with a larger error than promised."""
    _check_within_bound(codec, pages(fmt) * _six(SIZES) + _six(OFFSETS), fmt, "random elements")


def check_constant_groups(codec: Codec, fmt: Format) -> None:
    """Groups of equal elements, zeros among them, come back finite and within the bound."""
    _check_within_bound(codec, 0 * pages(fmt) + _six(CONSTANTS), fmt, "groups of equal elements")


def check_large(codec: Codec, fmt: Format) -> None:
    """Elements near the end of fp16's range come back finite and within the bound, or are refused by CacheError."""
    large = LARGE * pages(fmt).tanh()
    try:
        codec.encode(large, fmt)
    except CacheError:
        return
    _check_within_bound(codec, large, fmt, f"elements as large as {LARGE:g}")


def _six(numbers: tuple[float, ...]) -> torch.Tensor:
    """One for each head of each sequence of the samples."""
    return torch.tensor(numbers).view(2, 3, 1, 1, 1)


def _check_within_bound(codec: Codec, x: torch.Tensor, fmt: Format, what: str) -> None:
    decoded = codec.decode(codec.encode(x, fmt), fmt)
    if not bool(decoded.isfinite().all()):
        raise AssertionError(f"{fmt}: {what} do not decode to finite numbers.")
    error, bound = (decoded - x).abs(), codec.bound(x, fmt)
    if bound.shape != x.shape:
        raise AssertionError(f"{fmt}: bound gives {list(bound.shape)} where {list(x.shape)} is asked.")
    worst = (error - bound).argmax()
    if not bool((error <= bound).all()):
        raise AssertionError(
            f"{fmt}: of {what}, {float(x.flatten()[worst]):.6g} decodes to {float(decoded.flatten()[worst]):.6g}, "
            f"while the codec promises an error of at most {float(bound.flatten()[worst]):.3g}."
        )


def check_nonfinite(codec: Codec, fmt: Format) -> None:
    """NaN and infinities are refused by CacheError, wherever they are: they have no code."""
    for value in NOT_FINITE:
        for place in (0, -1):
            x = pages(fmt)
            x.view(-1)[place] = value
            _check_refused(codec, x, fmt, value)


def _check_refused(codec: Codec, x: torch.Tensor, fmt: Format, value: float) -> None:
    try:
        codec.encode(x, fmt)
    except CacheError:
        return
    except Exception as error:
        raise AssertionError(
            f"{fmt}: {value} among the elements raises {type(error).__name__}, not CacheError."
        ) from error
    raise AssertionError(f"{fmt}: {value} among the elements is encoded; raise CacheError.")
