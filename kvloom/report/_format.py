"""How figures are written: few digits, units named, a dash where there is nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvloom.report._values import Interval

DASH = "–"

Formatter = Callable[[float | None], str]


def format_small(value: float | None) -> str:
    """Write a quantity that spans decades (KLD, gradient norms): 1.07, 0.213, 0.0034, 3.4e-06."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-5 or size >= 1e6:
        return f"{value:.1e}"
    if size < 0.01:
        return f"{value:.{1 - math.floor(math.log10(size))}f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def format_bits(value: float | None) -> str:
    """Write true bits with two decimals."""
    return DASH if value is None else f"{value:.2f}"


def format_budget(value: float | None) -> str:
    """Write a target in bits: two decimals, without trailing zeros."""
    return DASH if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def format_bytes(value: float | None) -> str:
    """Write a number of bytes in B, KiB, MiB or GiB with three significant digits."""
    if value is None:
        return DASH
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    decimals = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f} {unit}"


def format_ppl(value: float | None) -> str:
    """Write a perplexity: 14.20, 687.0, 12,345."""
    if value is None:
        return DASH
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def format_share(value: float | None) -> str:
    """Write a share between 0 and 1 as a percentage."""
    return DASH if value is None else f"{100 * value:.1f} %"


def format_rate(value: float | None) -> str:
    """Write tokens per second."""
    return DASH if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def format_count(value: float | None) -> str:
    """Write a whole number with thousands separators."""
    return DASH if value is None else f"{value:,.0f}"


def format_times(value: float | None) -> str:
    """Write a ratio: 3.1×, 12×."""
    return DASH if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def format_bounds(interval: Interval, formatter: Formatter) -> str:
    """Write the ends of an interval as `[low, high]`; nothing where one is absent or both agree."""
    if interval.bounds is None:
        return ""
    low, high = interval.bounds
    if low == high:
        return ""
    return f"[{formatter(low)}, {formatter(high)}]"


def format_interval(interval: Interval, formatter: Formatter) -> str:
    """Write `value [low, high]`, or the value alone."""
    return f"{formatter(interval.value)} {format_bounds(interval, formatter)}".rstrip()


def join_words(words: list[str], limit: int = 4) -> str:
    """Join names as `a, b and c`; past `limit` names, `a, b, c and 4 more`."""
    if len(words) > limit:
        words = [*words[: limit - 1], f"{len(words) - limit + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def format_context(value: float | None) -> str:
    """Write a context length, which counts in 1,024s: 512, 8K, 128K, 2.5M."""
    if value is None:
        return DASH
    if value < 1024:
        return f"{value:.0f}"
    if value < 1024**2:
        return f"{value / 1024:,.1f}".removesuffix(".0") + "K"
    return f"{value / 1024**2:,.1f}".removesuffix(".0") + "M"


def format_seconds(value: float | None) -> str:
    """Write a time: 2.4 µs, 93.3 ms, 3.85 s."""
    if value is None:
        return DASH
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            break
    scaled = value / size
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
