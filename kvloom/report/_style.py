"""Colour class and marker of each method; the colours themselves are in page.css."""

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


@dataclass(frozen=True)
class Style:
    """A CSS class and the name of a marker."""

    css: str
    shape: str


_STYLES = {
    "dense": Style("m-dense", "circle"),
    "exact": Style("m-exact", "circle"),
    "kvmix": Style("m-kvmix", "square"),
    "uniform": Style("m-uniform", "diamond"),
    "uniform+sinks": Style("m-sinks", "cross"),
    "quanto": Style("m-quanto", "up"),
    "hqq": Style("m-hqq", "down"),
}


def method_style(method: str) -> Style:
    """The style of a method; all unknown ones share one."""
    return _STYLES.get(method, Style("m-other", "cross"))
