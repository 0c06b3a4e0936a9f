"""Colours and markers: of methods, of series that have names only, and of shades; page.css has the rest."""

from __future__ import annotations

from dataclasses import dataclass

MARKERS = {
    "circle": "M-5,0A5,5,0,1,0,5,0A5,5,0,1,0,-5,0Z",
    "square": "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "diamond": "M0,-6L6,0L0,6L-6,0Z",
    "up": "M0,-6L5.6,4.4H-5.6Z",
    "down": "M0,6L5.6,-4.4H-5.6Z",
    "cross": "M-5.5,-2H-2V-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5Z",
}

COLOURS = {
    "exact": ("#0b62a8", "#6cb6f5"),
    "kvmix": ("#c2570c", "#f0a05c"),
    "uniform": ("#6b747d", "#a9b2bb"),
    "sinks": ("#6a4fb3", "#c9b8f2"),
    "quanto": ("#0a7f5f", "#46c79f"),
    "hqq": ("#a8437f", "#e48bc0"),
    "other": ("#7a6a00", "#d3c65a"),
    "key": ("#5b4bc4", "#b3a4ff"),
    "value": ("#94690a", "#d9b64a"),
    "dense": ("#57616b", "#a3acb4"),
}
"""Colour by name, on a light page and on a dark one; class `m-NAME` draws in it."""


@dataclass(frozen=True)
class Style:
    """A colour of `COLOURS` and the name of a marker."""

    colour: str
    shape: str

    @property
    def css(self) -> str:
        """The CSS class that draws in the colour."""
        return f"m-{self.colour}"


_STYLES = {
    "dense": Style("dense", "circle"),
    "exact": Style("exact", "circle"),
    "kvmix": Style("kvmix", "square"),
    "uniform": Style("uniform", "diamond"),
    "uniform+sinks": Style("sinks", "cross"),
    "quanto": Style("quanto", "up"),
    "hqq": Style("hqq", "down"),
    "greedy": Style("key", "circle"),
    "kvq": Style("value", "diamond"),
    "kvtuner": Style("value", "up"),
    "kvtuner-warm": Style("value", "down"),
}

_NAMED = tuple(
    Style(colour, shape)
    for colour, shape in (
        ("exact", "circle"),
        ("kvmix", "square"),
        ("quanto", "up"),
        ("hqq", "down"),
        ("sinks", "cross"),
        ("value", "diamond"),
        ("uniform", "circle"),
        ("key", "square"),
    )
)


def method_style(method: str) -> Style:
    """The style of a method; all unknown ones share one."""
    return _STYLES.get(method, Style("other", "cross"))


def named_style(index: int) -> Style:
    """The style of the series in place `index`, where series are no methods; they repeat after eight."""
    return _NAMED[index % len(_NAMED)]
