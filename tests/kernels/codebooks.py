"""Formats of codebook form, every width on either side and along either axis, for every backend's tests."""

from __future__ import annotations

from typing import Any

from kvloom.pages import Format, Grouping

CASES = 8
_BITS = [(2, 2), (3, 3), (4, 4), (2, 3), (4, 2), (3, 4), (1, 4), (4, 1)]


def codebook_formats(case: int, head_dim: int) -> tuple[Format, Format]:
    """Keys and values; odd cases turn the groups, and have groups of their own."""
    axes: list[tuple[Grouping, int]] = [("per_channel", 64), ("per_token", head_dim)]
    if case % 2:
        axes = [("per_token", 16), ("per_channel", 32)]
    key, value = (
        _format(bits, case // 2 + side, *axis) for side, (bits, axis) in enumerate(zip(_BITS[case], axes, strict=True))
    )
    return key, value


def _format(bits: int, which: int, grouping: Grouping, size: int) -> Format:
    """``lloyd`` and ``nuq`` by turns."""
    options: dict[str, Any] = {"codec": "lloyd", "symmetric": True}
    if which % 2 and bits > 1:
        even = [(2 * i + 1) / 2**bits - 1 for i in range(2**bits)]
        options = {"codec": "nuq", "codebook": tuple(0.9 * x * abs(x) + 0.05 for x in even)}
    return Format(bits, grouping, size, **options)
