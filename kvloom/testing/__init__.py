"""Conformance tests for what users add to kvloom: is my codec, my eviction policy, my signal, a good citizen?

    from kvloom.testing import check_codec, check_policy, check_signal

    def test_my_codec():
        check_codec(MyCodec())

    def test_my_policy():
        check_policy(MyPolicy(window=16))

    def test_my_signal():
        check_signal(MySignal())

Every check raises AssertionError with a sentence that names the codec and the format, the policy or the signal, and
what is wrong.
"""

from __future__ import annotations

from kvloom.testing._cached import check_attention, check_bytes, check_lengths, check_saved
from kvloom.testing._codec import CACHE_CHECKS, CODEC_CHECKS, check_codec
from kvloom.testing._encoding import check_codes, check_dtypes, check_facts, check_pages_apart, check_repeats
from kvloom.testing._errors import check_bound, check_constant_groups, check_large, check_nonfinite
from kvloom.testing._formats import cache_formats, codec_formats
from kvloom.testing._policy import (
    POLICY_CHECKS,
    PolicyCheck,
    check_counts,
    check_kept,
    check_padding,
    check_policy,
    check_scores,
    check_sequences_apart,
)
from kvloom.testing._signal import (
    SIGNAL_CHECKS,
    SignalCheck,
    check_bits,
    check_kind,
    check_losses,
    check_losses_repeat,
    check_prompts_apart,
    check_resumed,
    check_signal,
    check_untouched,
)

__all__ = [
    "CACHE_CHECKS",
    "CODEC_CHECKS",
    "POLICY_CHECKS",
    "SIGNAL_CHECKS",
    "PolicyCheck",
    "SignalCheck",
    "cache_formats",
    "check_attention",
    "check_bits",
    "check_bound",
    "check_bytes",
    "check_codec",
    "check_codes",
    "check_constant_groups",
    "check_counts",
    "check_dtypes",
    "check_facts",
    "check_kept",
    "check_kind",
    "check_large",
    "check_lengths",
    "check_losses",
    "check_losses_repeat",
    "check_nonfinite",
    "check_padding",
    "check_pages_apart",
    "check_policy",
    "check_prompts_apart",
    "check_repeats",
    "check_resumed",
    "check_saved",
    "check_scores",
    "check_sequences_apart",
    "check_signal",
    "check_untouched",
    "codec_formats",
]
