"""What a time means: rates, shares of what the device can do, ratios to the best dense attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvloom.bench._ceilings import Ceilings
from kvloom.bench._timing import Timing


@dataclass(frozen=True)
class Dense:
    """The fastest dense attention of a run at a shape.

    Attributes:
        name: Which.
        seconds: Median time.
        nbytes: Bytes it must move.
    """

    name: str
    seconds: float
    nbytes: int


def rates(timing: Timing, nbytes: int, ceilings: Ceilings) -> dict[str, Any]:
    """Fields of every timed record: time in seconds, bytes, bytes a second, shares of the measured bandwidths."""
    rate = nbytes / timing.seconds
    return {
        **asdict(timing),
        "nbytes": nbytes,
        "bytes_per_s": rate,
        "share_of_read": rate / ceilings.read,
        "share_of_copy": rate / ceilings.copy,
    }


def times_bound(timing: Timing, nbytes: int, ceilings: Ceilings) -> float:
    """The time over the least that reading ``nbytes`` bytes takes at the measured bandwidth."""
    return timing.seconds * ceilings.read / nbytes


def against_dense(timing: Timing, nbytes: int, dense: Dense | None) -> dict[str, Any]:
    """Fields of a comparison: times as fast as the best dense attention, and what the bytes alone would allow."""
    if dense is None:
        return {"dense": None, "times_dense": None, "bytes_allow": None}
    return {
        "dense": dense.name,
        "times_dense": dense.seconds / timing.seconds,
        "bytes_allow": dense.nbytes / nbytes,
    }
