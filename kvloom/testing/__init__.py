"""Conformance tests for what users add to kvloom: is my codec a good citizen?

    from kvloom.testing import check_codec

    def test_my_codec():
        check_codec(MyCodec())

Every check raises AssertionError with a sentence that names the codec, the format and what is wrong.
"""

from __future__ import annotations

from kvloom.testing._cached import check_attention, check_bytes, check_lengths, check_saved
from kvloom.testing._codec import CACHE_CHECKS, CODEC_CHECKS, check_codec
from kvloom.testing._encoding import check_codes, check_dtypes, check_facts, check_pages_apart, check_repeats
from kvloom.testing._errors import check_bound, check_constant_groups, check_nonfinite
from kvloom.testing._formats import cache_formats, codec_formats

__all__ = [
    "CACHE_CHECKS",
    "CODEC_CHECKS",
    "cache_formats",
    "check_attention",
    "check_bound",
    "check_bytes",
    "check_codec",
    "check_codes",
    "check_constant_groups",
    "check_dtypes",
    "check_facts",
    "check_lengths",
    "check_nonfinite",
    "check_pages_apart",
    "check_repeats",
    "check_saved",
    "codec_formats",
]
