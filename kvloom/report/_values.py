"""Values out of records: numbers that may be absent, and numbers with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


def number(value: object) -> float | None:
    """Return `value` as a float, or None where it is absent, NaN or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def numbers(values: object) -> list[float | None]:
    """Return a list of numbers, absent ones as None; anything but a list gives `[]`."""
    return [number(value) for value in values] if isinstance(values, list) else []


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; each part may be absent."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, entry: object) -> Interval:
        """Read `{"value", "low", "high"}`, or a bare number without an interval."""
        if isinstance(entry, Mapping):
            return cls(*(number(entry.get(part)) for part in ("value", "low", "high")))
        return cls(number(entry))

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends, or None where one is absent."""
        if self.low is None or self.high is None:
            return None
        return self.low, self.high
