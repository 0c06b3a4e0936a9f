from __future__ import annotations

import pytest

from kvloom.assets import SHAPES
from kvloom.bench import PRESETS, Load, make_loads, make_preset
from kvloom.errors import PlanError


def test_words_are_read():
    loads = make_loads("B1x8K, B*x32K,B30x688,B1x8K")
    assert loads == (Load(1, 8192), Load(None, 32768), Load(30, 688))
    assert [load.label for load in loads] == ["B1x8K", "B*x32K", "B30x688"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("8x32K", "--shapes: cannot read '8x32K'; give batch and prompt tokens as in B8x32K or B*x32K."),
        ("B8x32G", "--shapes B8x32G: cannot read '32G'"),
        ("", "cannot read ''"),
        ("B0x64", "--shapes B0x64: give a batch and a number of tokens above 0."),
        ("B*x0", "--shapes B*x0: give a batch"),
    ],
)
def test_mistakes_name_the_word(words: str, message: str):
    with pytest.raises(PlanError) as failed:
        make_loads(words)
    assert message in str(failed.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_measured(name: str):
    preset = make_preset(name)
    assert preset.shape in SHAPES
    assert make_loads(preset.loads)
    assert preset.new_tokens > 1


def test_what_kvmix_published():
    preset = make_preset("kvmix")
    assert (preset.shape, preset.new_tokens) == ("llama-2-7b", 1024)
    assert make_loads(preset.loads) == (Load(4, 688), Load(None, 688))


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(PlanError, match=r"--preset 'gear' is unknown; choose one of .*kivi"):
        make_preset("gear")
