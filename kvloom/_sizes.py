"""Numbers of bytes and of tokens, as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvloom.errors import PlanError

TOKENS = {"": 1, "K": 2**10, "M": 2**20}
"""Units of context lengths, which count in 1024s."""

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([A-Za-z]*)")


def parse_bytes(text: str | int) -> int:
    """Reads a size such as `6GiB` (2**30), `24 GB` (10**9), `512 B` or a plain number of bytes.

    Raises:
        PlanError: no such size; a bare `6G` is refused because it could mean either.
    """
    return _parse(text, _BYTES, 'bytes such as 6GiB, "24 GB" or 6442450944')


def parse_tokens(text: str | int) -> int:
    """Reads a context length such as `128K` (131072: context lengths count in 1024s) or `2048`.

    Raises:
        PlanError: no such length.
    """
    return _parse(text, TOKENS, "tokens such as 2048, 128K or 1M")


def _parse(text: str | int, units: Mapping[str, int], wanted: str) -> int:
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or match[2].upper() not in units:
        raise PlanError(f"cannot read {text!r}: give a number of {wanted}")
    number, unit = match.groups()
    return round(float(number) * units[unit.upper()]) if "." in number else (int(number) * units[unit.upper()])
