"""The whole suite for a codec."""

from __future__ import annotations

from collections.abc import Callable

from kvloom.codecs import Codec
from kvloom.pages import Format
from kvloom.testing._cached import check_attention, check_bytes, check_lengths, check_saved
from kvloom.testing._encoding import check_codes, check_dtypes, check_facts, check_pages_apart, check_repeats
from kvloom.testing._errors import check_bound, check_constant_groups, check_large, check_nonfinite
from kvloom.testing._formats import cache_formats, codec_formats

Check = Callable[[Codec, Format], None]

CODEC_CHECKS: tuple[Check, ...] = (
    check_codes,
    check_repeats,
    check_pages_apart,
    check_dtypes,
    check_bound,
    check_constant_groups,
    check_large,
    check_nonfinite,
)
"""Checks of the codec alone, for every format of `codec_formats`."""

CACHE_CHECKS: tuple[Check, ...] = (check_lengths, check_bytes, check_saved, check_attention)
"""Checks of the codec in a cache, for every format of `cache_formats`."""


def check_codec(codec: Codec) -> None:
    """Check everything that kvloom asks of a codec; it need not be registered.

    Raises:
        AssertionError: It is not a good citizen; the message names the format and says what is wrong.
        MissingExtraError: It needs a package that is not installed.
    """
    check_facts(codec)
    codec.prepare()
    for checks, formats in ((CODEC_CHECKS, codec_formats(codec)), (CACHE_CHECKS, cache_formats(codec))):
        for fmt in formats:
            for check in checks:
                check(codec, fmt)
