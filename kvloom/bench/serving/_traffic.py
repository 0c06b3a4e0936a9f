"""When requests are sent: so many at a time, or at random moments of a mean rate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from kvloom.bench._grid import words
from kvloom.errors import PlanError


@dataclass(frozen=True)
class Traffic:
    """How requests come; one of the two is given.

    Attributes:
        concurrency: Requests under way at any time: the next one is sent when one is finished.
        rate: Mean requests a second. They are sent at random moments, however many are under way: the times between
            them are exponential (a Poisson process).
    """

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        """For tables: ``8 at a time``, ``2.5 a second``."""
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:g} a second"

    def moments(self, count: int, seed: int) -> list[float]:
        """Seconds from the start at which ``count`` requests are sent, if there is a rate."""
        assert self.rate is not None
        draw = random.Random(seed)
        return list(accumulate(draw.expovariate(self.rate) for _ in range(count)))


def make_traffic(concurrency: str | None, rate: str | None) -> tuple[Traffic, ...]:
    """Read ``1,8,32`` requests at a time, then ``2,4.5`` requests a second.

    Raises:
        PlanError: A number cannot be read or is not positive, or there is none.
    """
    made = [Traffic(concurrency=int(number)) for number in _numbers("--concurrency", concurrency, int)]
    made += [Traffic(rate=number) for number in _numbers("--rate", rate, float)]
    if not made:
        raise PlanError("nothing says how requests come: give --concurrency 8, or --rate 4.")
    return tuple(dict.fromkeys(made))


def _numbers(option: str, text: str | None, kind: type[int] | type[float]) -> Iterator[float]:
    for word in words(text) if text else ():
        try:
            number = kind(word)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise PlanError(f"{option}: cannot read {word!r}; give positive numbers with commas between.")
        yield number
