"""Tables of figures as the page draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A cell: its figure, the interval beside it, a line below it, a CSS class, and what hovering tells."""

    text: str
    bounds: str = ""
    below: str = ""
    css: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Table:
    """Cells under headings.

    Attributes:
        label: the table in words.
        headings: one for each column, with a line below it; the first `words` columns hold words, which align left.
        rows: their cells.
        words: how many columns hold words.
        caption: what must be known to read it.
    """

    label: str
    headings: tuple[Entry, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: int = 1
    caption: str = ""


def headings(*texts: str) -> tuple[Entry, ...]:
    """Headings of one line."""
    return tuple(map(Entry, texts))
