"""Every codec that kvloom brings passes the suite it ships, and says by itself what plans say of it."""

from __future__ import annotations

import pytest

from kvloom import _extras, codecs
from kvloom.codecs import AffineForm, CodebookForm
from kvloom.pages import codec_facts
from kvloom.testing import check_codec


@pytest.mark.parametrize("name", codecs.names())
def test_a_good_citizen(name: str) -> None:
    if name in _extras.EXTRAS and _extras.missing(name):
        pytest.skip(f"the extra {name} is not installed")
    check_codec(codecs.get(name))


@pytest.mark.parametrize("name", codecs.names())
def test_facts_are_those_plans_know(name: str) -> None:
    codec = codecs.get(name)
    assert codec.name == name
    assert codec.facts is codec_facts(name)
    assert isinstance(codec, {"affine": AffineForm, "codebook": CodebookForm, "opaque": codecs.Codec}[codec.facts.form])
