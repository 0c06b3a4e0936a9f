"""How time is taken: medians over cold inputs, on a GPU by replays of CUDA graphs.

A measurement walks enough copies of its input that none is still in the cache when its turn comes again.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from time import perf_counter
from typing import Literal

import torch

Launch = Callable[[], object]

# Seconds of timed work in one measurement, within these numbers of samples.
SECONDS = 0.15
MIN_SAMPLES = 10
MAX_SAMPLES = 200
# Launches in a graph, at least, unless one takes long: the cost of starting a graph is spread over them.
MIN_LAUNCHES = 8
LONG_SECONDS = 2e-3
WARM_UP_REPLAYS = 3
# A cold input is one of several that fill the last-level cache this often.
CACHE_FILLS = 4
CPU_COLD_BYTES = 64 << 20
CPU_MAX_COPIES = 32


@dataclass(frozen=True)
class Timing:
    """Time of one launch in seconds.

    Attributes:
        seconds: Median over samples.
        p10: 10th percentile.
        p90: 90th percentile.
        method: ``graph``: CUDA graph replays; ``events``: launched one by one, since the code waits for the device and
            cannot be captured, or laps of a stopwatch on the device; ``wall``: the host's clock.
    """

    seconds: float
    p10: float
    p90: float
    method: Literal["graph", "events", "wall"]


class Stopwatch(ABC):
    """Takes the time between marks that somebody else's loop sets; nobody waits until `laps` is asked for."""

    method: Literal["events", "wall"]

    @abstractmethod
    def mark(self) -> None:
        """Set a mark behind the work enqueued so far."""

    @abstractmethod
    def laps(self) -> list[float]:
        """Seconds from each mark to the next."""


class Clock(ABC):
    """Takes the time of launches on one kind of device."""

    @abstractmethod
    def copies(self, nbytes: int) -> int:
        """Inputs of ``nbytes`` bytes each that a measurement walks so that each is cold."""

    @abstractmethod
    def time(self, launches: Sequence[Launch]) -> Timing:
        """Time of one launch; each has its own input, of which there are `copies`."""

    @abstractmethod
    def stopwatch(self) -> Stopwatch:
        """A stopwatch without marks."""


def clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def summary(samples: Sequence[float], method: Literal["graph", "events", "wall"]) -> Timing:
    """Median and spread of samples in seconds."""
    low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return Timing(float(middle), float(low), float(high), method)


def sample_count(seconds: float) -> int:
    """Samples to take of something that takes ``seconds``."""
    return min(MAX_SAMPLES, max(MIN_SAMPLES, math.ceil(SECONDS / max(seconds, 1e-9))))


def rounds(seconds: float, launches: int) -> int:
    """How often a graph holds each of its launches, of which one takes ``seconds``."""
    return 1 if seconds > LONG_SECONDS else math.ceil(MIN_LAUNCHES / launches)


class CpuClock(Clock):
    """Wall clock, launch by launch."""

    def copies(self, nbytes: int) -> int:
        """See `Clock.copies`; at most 32, so that small inputs may stay in the cache."""
        return min(CPU_MAX_COPIES, 1 + CPU_COLD_BYTES // nbytes)

    def time(self, launches: Sequence[Launch]) -> Timing:
        """See `Clock.time`."""
        for launch in launches:
            launch()
        turn = cycle(launches)
        first = _wall(next(turn))
        return summary([_wall(next(turn)) for _ in range(sample_count(first))], "wall")

    def stopwatch(self) -> Stopwatch:
        """See `Clock.stopwatch`."""
        return _WallStopwatch()


class CudaClock(Clock):
    """Events around replays of a graph that launches everything once or more.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cold_bytes = CACHE_FILLS * torch.cuda.get_device_properties(device).L2_cache_size

    def copies(self, nbytes: int) -> int:
        """See `Clock.copies`."""
        return 1 + self._cold_bytes // nbytes

    def time(self, launches: Sequence[Launch]) -> Timing:
        """See `Clock.time`."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
            capturable = _never_waits(launches[0])
            (one,) = _between_events(launches[0], 1)
            work = list(launches) * rounds(one, len(launches))
            replay = _captured(work, stream) if capturable else lambda: [launch() for launch in work]
            for _ in range(WARM_UP_REPLAYS):
                replay()
            (first,) = _between_events(replay, 1)
            samples = _between_events(replay, sample_count(first))
        return summary([sample / len(work) for sample in samples], "graph" if capturable else "events")

    def stopwatch(self) -> Stopwatch:
        """See `Clock.stopwatch`."""
        return _EventStopwatch(self._device)


class _WallStopwatch(Stopwatch):
    method = "wall"

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(perf_counter())

    def laps(self) -> list[float]:
        return [end - start for start, end in pairwise(self._marks)]


class _EventStopwatch(Stopwatch):
    method = "events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def laps(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self._marks)]


def _wall(launch: Launch) -> float:
    started = perf_counter()
    launch()
    return perf_counter() - started


def _never_waits(launch: Launch) -> bool:
    """Whether a launch never waits for the device, without which a capture fails and leaves torch's state broken."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode announces itself as a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return True


def _captured(work: Sequence[Launch], stream: torch.cuda.Stream) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in work:
            launch()
    return graph.replay


def _between_events(replay: Launch, times: int) -> list[float]:
    """Seconds of each replay, all enqueued before the first is waited for, so that the device never idles."""
    marks = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        marks.append((start, end))
    marks[-1][1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]
