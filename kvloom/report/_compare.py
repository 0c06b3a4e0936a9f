"""What the records allow to be said about the exact plan against another method."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

from kvloom.report._runs import Row, Run
from kvloom.report._values import Interval, numbers

BITS_ABOVE = 0.02  # the plan may hold this many more true bits than its rival: rounding
BITS_BELOW = 0.5  # a plan with fewer bits than this below its rival is another point
MIN_BLOCKS = 8  # fewer blocks say too little about their own spread
STRICTNESS = {"exact": 0, "chunk-exact": 1, "quantized": 2}
Z_95 = 1.959964


@dataclass(frozen=True)
class Comparison:
    """An exact plan beside a rival that holds as many true bits or more.

    `ratio` is the rival's mean KLD over the plan's: above 1 the plan is better.
    """

    plan: Row
    rival: Row
    ratio: Interval
    blocks: int | None

    @property
    def verdict(self) -> str:
        """`below`, `above`, or `unclear` where the interval holds 1."""
        low, high = self.ratio.bounds or (0.0, math.inf)
        return "below" if low > 1 else "above" if high < 1 else "unclear"

    @property
    def basis(self) -> str:
        """How the interval of the ratio was obtained."""
        if self.blocks is None:
            return "from the two intervals"
        return f"paired over {self.blocks} blocks"


def compare(run: Run, *methods: str) -> list[Comparison]:
    """Set exact plans beside the best configurations of rival methods, by rising true bits.

    A rival is compared with the exact plan next below it in true bits, and only if the plan was
    scored under a protocol at least as strict.
    """
    found = []
    for rival in front(run.of(*methods)):
        plan = _partner(rival, run.of("exact"))
        if plan is not None:
            found.append(Comparison(plan, rival, *kld_ratio(plan, rival)))
    return found


def front(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other row beats in both true bits and KLD, by rising true bits."""
    best = math.inf
    kept = []
    for row in sorted(filter(has_place, rows), key=lambda row: (row.true_bits, row.kld.value)):
        if row.kld.value is not None and row.kld.value < best:
            best = row.kld.value
            kept.append(row)
    return kept


def kld_ratio(plan: Row, rival: Row) -> tuple[Interval, int | None]:
    """The rival's mean KLD over the plan's, its 95 % interval, and the number of blocks.

    Blocks of the same text are paired: log(r/p) has the standard error of mean(r_i/r - p_i/p)
    (delta method). Without enough blocks the interval is the widest that the two marginal
    intervals allow.
    """
    ours, theirs = _blocks(plan), _blocks(rival)
    if len(ours) == len(theirs) >= MIN_BLOCKS and fmean(ours) > 0 and fmean(theirs) > 0:
        mean, rival_mean = fmean(ours), fmean(theirs)
        spread = stdev(r / rival_mean - p / mean for p, r in zip(ours, theirs, strict=True))
        factor = math.exp(_t95(len(ours) - 1) * spread / math.sqrt(len(ours)))
        ratio = rival_mean / mean
        return Interval(ratio, ratio / factor, ratio * factor), len(ours)
    return _marginal_ratio(plan.kld, rival.kld), None


def _marginal_ratio(plan: Interval, rival: Interval) -> Interval:
    return Interval(
        _divide(rival.value, plan.value),
        _divide(rival.low, plan.high),
        _divide(rival.high, plan.low),
    )


def _divide(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _t95(freedom: int) -> float:
    """Student's t at 97.5 % (Fisher's expansion; within 0.01 from 7 degrees of freedom)."""
    z = Z_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _blocks(row: Row) -> list[float]:
    """Each block's KLD summed over its tokens; `[]` where the record lacks any."""
    blocks = row.record.get("blocks")
    if not isinstance(blocks, dict):
        return []
    means = numbers(blocks.get("kld"))
    tokens = numbers(blocks.get("tokens")) or [1.0] * len(means)
    if len(tokens) != len(means):
        return []
    sums = [mean * count for mean, count in zip(means, tokens, strict=True) if mean is not None and count is not None]
    return sums if len(sums) == len(means) else []


def _partner(rival: Row, plans: list[Row]) -> Row | None:
    fair = [plan for plan in plans if has_place(plan) and _comparable(plan, rival)]
    return max(fair, key=lambda plan: plan.true_bits or 0.0, default=None)


def _comparable(plan: Row, rival: Row) -> bool:
    ours, theirs = STRICTNESS.get(plan.prefill, -1), STRICTNESS.get(rival.prefill, math.inf)
    fair = plan.prefill == rival.prefill or ours >= theirs
    gap = (rival.true_bits or 0.0) - (plan.true_bits or 0.0)
    return fair and -BITS_ABOVE <= gap <= BITS_BELOW


def has_place(row: Row) -> bool:
    """Whether a row has a place on axes of true bits and log KLD."""
    kld = row.kld.value
    return row.true_bits is not None and kld is not None and 0 < kld < math.inf
