"""The registry that finds a signal by name, and the signals that come with kvloom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvloom._names import unknown
from kvloom.errors import PlanError
from kvloom.signals._base import Signal
from kvloom.signals._cache_norm import CacheNorm
from kvloom.signals._error_gradient import ErrorGradient
from kvloom.signals._first_order import FirstOrder
from kvloom.signals._fisher import Fisher
from kvloom.signals._gradient_norm import WEIGHT_GRADIENT, GradientNorm
from kvloom.signals._measured_kl import MeasuredKL
from kvloom.signals._output_error import OutputError
from kvloom.signals._query_weighted import QueryWeighted
from kvloom.signals._score_error import ScoreError
from kvloom.signals._state_error import STATE_ERROR
from kvloom.signals._weight_norm import WeightNorm, frobenius, spectral

_SIGNALS: dict[str, Signal] = {}


def register(signal: Signal) -> Signal:
    """Makes a signal known by its name.

    Raises:
        ValueError: Another signal has that name.
    """
    if signal.name in (*_SIGNALS, WEIGHT_GRADIENT.name):
        raise ValueError(f"the signal name {signal.name!r} is taken; choose another.")
    _SIGNALS[signal.name] = signal
    return signal


@contextmanager
def registered(signal: Signal) -> Iterator[None]:
    """Within the context profiles may name `signal`; afterwards its name means what it did before.

    Raises:
        ValueError: The name is one of kvloom's own, of no signal.
    """
    previous = _SIGNALS.pop(signal.name, None)
    register(signal)
    try:
        yield
    finally:
        del _SIGNALS[signal.name]
        if previous is not None:
            register(previous)


def get(name: str) -> Signal:
    """The signal of that name.

    Raises:
        PlanError: There is none.
    """
    if name not in _SIGNALS:
        raise PlanError(unknown("signal", name, signals(), listing="docs/signals.md"))
    return _SIGNALS[name]


def signals() -> tuple[str, ...]:
    """Names of the registered signals, sorted."""
    return tuple(sorted(_SIGNALS))


for _signal in (
    ErrorGradient(),
    FirstOrder(),
    Fisher(),
    GradientNorm(),
    STATE_ERROR,
    ScoreError(),
    OutputError(),
    QueryWeighted(),
    WeightNorm("weight_frobenius", frobenius),
    WeightNorm("weight_spectral", spectral),
    CacheNorm("cache_frobenius", frobenius),
    CacheNorm("cache_spectral", spectral),
    MeasuredKL("measured_kl", by_head=False),
    MeasuredKL("measured_kl_by_head", by_head=True),
):
    register(_signal)
