"""The conformance suite can fail: each check finds the codec that breaks what it checks, in a sentence."""

from __future__ import annotations

import pytest

from kvloom import codecs, testing
from kvloom.codecs import AFFINE, Codec
from kvloom.pages import Format, codec_facts
from kvloom.plan import Fingerprint, Plan
from kvloom.testing import _codec as suite
from tests.testing import own

CHANNEL, TOKEN = (Format(2, grouping, 64, codec="wrong") for grouping in ("per_channel", "per_token"))


MISSTATED = (own.Nameless, own.Outsized, own.Formless, own.Overfull, own.Pointless)


def test_a_codec_of_another_form_passes() -> None:
    testing.check_codec(own.Rooted())
    assert "rooted" not in codecs.names()


@pytest.mark.parametrize(
    ("codec", "check", "says"),
    [
        (own.CodesAboveTheLevels(), testing.check_codes, "a code is 4, above the largest, 3"),
        (own.WideCodes(), testing.check_codes, "codes are torch.int16"),
        (own.WideParams(), testing.check_codes, "parameters are torch.float32"),
        (own.LostParams(), testing.check_codes, "0 parameters a group where pages hold 2"),
        (own.Constant(), testing.check_codes, "every code of random elements is 0"),
        (own.Dithered(), testing.check_repeats, "other codes the second time"),
        (own.Remembering(), testing.check_repeats, "other codes the second time"),
        (own.InPlace(), testing.check_repeats, "changes the elements"),
        (own.TensorWide(), testing.check_pages_apart, "other codes alone than among 12"),
        (own.PageWide(), testing.check_pages_apart, "the last groups of a page"),
        (own.DtypeBound(), testing.check_dtypes, "other codes than the same values in float32"),
        (own.HalfDecoded(), testing.check_dtypes, "decode gives torch.float16"),
        (own.Boastful(), testing.check_bound, "while the codec promises an error of at most"),
        (own.Shifted(), testing.check_bound, "of random elements"),
        (own.Shifted(), testing.check_constant_groups, "of groups of equal elements"),
        (own.ZeroDivided(), testing.check_constant_groups, "do not decode to finite numbers"),
        (own.Overflowing(), testing.check_large, "elements as large as 60000 do not decode to finite numbers"),
        (own.Swallowing(), testing.check_nonfinite, "nan among the elements is encoded"),
        (own.SwallowingInfinity(), testing.check_nonfinite, "inf among the elements is encoded"),
        (own.RefusingOtherwise(), testing.check_nonfinite, "ZeroDivisionError, not CacheError"),
        (own.Dithered(), testing.check_lengths, "leave another cache when they come one by one"),
        (own.WideParams(), testing.check_bytes, "take 3072 bytes; a page has 2560|take 1536 bytes; a page has 1280"),
        (own.Dithered(), testing.check_saved, "saved and loaded differs"),
        (own.Shifted(), testing.check_attention, "off attention over the decoded values"),
        (own.FalselyAffine(), testing.check_attention, "any other has to say so in its facts"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Codec) else getattr(x, "__name__", ""),
)
def test_a_wrong_codec_is_found(codec: Codec, check: suite.Check, says: str) -> None:
    fmt = TOKEN if check is testing.check_pages_apart and isinstance(codec, own.PageWide) else CHANNEL
    with pytest.raises(AssertionError, match=says) as caught:
        check(codec, fmt)
    assert str(caught.value).startswith("Format(bits=2")
    check(AFFINE, Format(2, fmt.grouping, 64))


@pytest.mark.parametrize(
    "codec",
    [kind() for kind in own.Wrong.__subclasses__() if kind not in MISSTATED]
    + [own.FalselyAffine(), own.FalselyPointed()],
    ids=lambda codec: type(codec).__name__,
)
def test_the_whole_suite_finds_it_too(codec: Codec) -> None:
    with pytest.raises(AssertionError, match=r"^Format\("):
        testing.check_codec(codec)
    assert "wrong" not in codecs.names()


def test_facts_are_checked() -> None:
    with pytest.raises(AssertionError, match="Nameless has no name"):
        testing.check_codec(own.Nameless())
    with pytest.raises(AssertionError, match=r"says it takes \[7\] bits"):
        testing.check_codec(own.Outsized())
    with pytest.raises(AssertionError, match="neither symmetric formats nor others"):
        testing.check_codec(own.Formless())
    with pytest.raises(AssertionError, match="codebooks of more than 4 bits"):
        testing.check_codec(own.Overfull())
    with pytest.raises(AssertionError, match="codebooks of other sizes than its bits ask for"):
        testing.check_codec(own.Pointless())


def test_a_codec_that_misstates_its_points_is_found() -> None:
    fmt = Format(2, "per_channel", 64, True, "wrong")
    with pytest.raises(AssertionError, match=r"one of codebook form as scale \* point\[code\] \+ zero"):
        testing.check_attention(own.FalselyPointed(), fmt)


def test_every_check_is_in_the_suite() -> None:
    whole = {"check_codec", "check_facts", "check_policy", "check_signal"}
    public = {name for name in testing.__all__ if name.startswith("check_")} - whole
    checks = (*testing.CODEC_CHECKS, *testing.CACHE_CHECKS, *testing.POLICY_CHECKS, *testing.SIGNAL_CHECKS)
    assert {check.__name__ for check in checks} == public


def test_a_plan_says_that_attention_decodes_what_only_a_codec_can() -> None:
    model = Fingerprint(
        architecture="LlamaForCausalLM",
        num_layers=1,
        packed_layers=(0,),
        num_kv_heads=2,
        head_dim=64,
        dtype="float32",
    )
    with codecs.registered(own.Rooted()):
        assert codec_facts("rooted").form == "opaque"
        text = Plan.uniform(model, 2, 2, value_codec="rooted").describe()
    assert "values 2b/tok-head/rooted" in text
    assert "attention decodes the pages of rooted first: memory is saved, speed is not" in text
