"""Codecs by name: those of kvloom, those of users, and those whose package is absent."""

from __future__ import annotations

import pytest
import torch

from kvloom import _extras, codecs
from kvloom.codecs import Affine
from kvloom.codecs import _hqq as hqq
from kvloom.codecs import _quanto as quanto
from kvloom.errors import MissingExtraError, PlanError
from kvloom.pages import CodecFacts, Format, codec_facts
from kvloom.plan import TensorSpec


class Own(Affine):
    name = "own"
    facts = CodecFacts(bits=(4,))


def test_a_codec_of_ones_own_is_known_to_plans_while_it_is_registered() -> None:
    with pytest.raises(ValueError, match="codec 'own' is unknown"):
        TensorSpec(codec="own", bits=4, grouping="per_token")
    with codecs.registered(Own()):
        assert "own" in codecs.names()
        assert TensorSpec(codec="own", bits=4, grouping="per_token").label == "4b/tok64/own"
        with pytest.raises(ValueError, match="bits 3 is not one of"):
            TensorSpec(codec="own", bits=3, grouping="per_token")
    assert "own" not in codecs.names()
    with pytest.raises(PlanError, match="'own' is unknown"):
        codec_facts("own")


def test_a_stand_in_gives_way_to_what_it_stood_for() -> None:
    class Other(Affine):
        name = "affine"
        facts = CodecFacts(bits=(2,))

    with codecs.registered(Other()):
        assert codec_facts("affine").bits == (2,)
    assert codecs.get("affine") is codecs.AFFINE
    assert codec_facts("affine") is codecs.AFFINE.facts


@pytest.mark.parametrize("name", ["hqq", "quanto"])
def test_an_absent_package_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras, "_found", lambda _: False)
    for module in (hqq, quanto):
        module._library.cache_clear()
    codec = codecs.get(name)
    for act in (codec.prepare, lambda: codec.encode(torch.randn(64, 64), Format(4, "per_token", 64, codec=name))):
        with pytest.raises(MissingExtraError, match=rf"^The {name} codec needs .*pip install 'kvloom\[{name}\]'\.$"):
            act()


@pytest.mark.parametrize(
    ("fmt", "says"),
    [
        (Format(4, "per_token", 64, True, "hqq"), "symmetric is not for codec 'hqq'"),
        (
            Format(4, "per_token", 64, False, "lloyd"),
            "symmetric is false where codec 'lloyd' never stores a zero point",
        ),
        (Format(3, "per_token", 64, False, "quanto"), r"bits 3 is not one of \(2, 4\), the widths that codec 'quanto'"),
    ],
)
def test_a_format_that_a_codec_does_not_take_is_refused(fmt: Format, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        codecs.get(fmt.codec).encode(torch.randn(64, 64), fmt)
