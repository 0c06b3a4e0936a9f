"""Public packages as contestants: what is left out and why, and bits by hand arithmetic where they are installed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import packages
from kvloom.evaluate import Protocol, fidelity
from kvloom.evaluate._live import true_bits
from kvloom.plan import Fingerprint
from tests.evaluate.test_peers import DIM, FakeModel, filled
from tests.evaluate.tiny_llama import random_windows, tiny_model

TOKENS = 300


def found(package: str, model):
    pytest.importorskip(package.replace("-", "_").removesuffix("_kv"))
    return list(packages.PACKAGES[package](model))


def test_an_absent_package_is_one_sentence_with_the_reason(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(packages, "import_module", absent)
    assert packages.package_contestants(FakeModel()) == packages.Peers(
        (),
        tuple(
            f"{name} is left out: it does not work here (ModuleNotFoundError: No module named '{module}')."
            for name, module in (
                ("tiny-turboquant", "tiny_turboquant"),
                ("turboquant", "turboquant.cache"),
                ("nexusquant-kv", "nexusquant.integrations.quantized_cache"),
                ("kakeyalattice", "kakeyalattice.hf"),
            )
        ),
    )


def test_a_package_that_fails_at_an_update_is_left_out(monkeypatch):
    class Broken:
        def update(self, *args):
            raise RuntimeError("no such kernel.\nlong log")

    broken = packages.Contestant("broken", "broken", None, Broken)
    monkeypatch.setattr(packages, "PACKAGES", {"broken": lambda model: iter([broken])})
    assert packages.package_contestants(FakeModel()).notes == (
        "broken is left out: it does not work here (RuntimeError: no such kernel).",
    )


@pytest.mark.parametrize(("bits", "window", "expected"), [(2.25, 0, 2.25), (2.25, 100, (200 * 2.25 + 1600) / 300)])
def test_stated_bits_are_counted_with_the_exact_tokens(bits, window, expected):
    model = FakeModel()
    own = packages.Contestant("a", "a", None, lambda: None, stated_bits=packages._stated(bits, window))

    class Filled:
        def get_seq_length(self):
            return TOKENS

    assert true_bits(own, Filled(), Fingerprint.of(model)) == expected


def test_tiny_turboquant_is_counted_on_its_tensors():
    model = FakeModel()
    for own in found("tiny-turboquant", model):
        key, value, group, window = (
            own.settings[name] for name in ("key_bits", "value_bits", "value_group_size", "residual_len")
        )
        packed = max(0, TOKENS - window) // 128 * 128
        element = (key + 2 * 16 / 128 + value + 2 * 16 / (group or DIM)) / 2
        expected = (packed * element + 16 * (TOKENS - packed)) / TOKENS
        assert true_bits(own, filled(own, [TOKENS]), Fingerprint.of(model)) == pytest.approx(expected), own.name


def test_kakeyalattice_states_what_its_lattice_and_two_scales_take():
    bits = {own.name: own.stated_bits(filled(own, [TOKENS])) for own in found("kakeyalattice", FakeModel())}
    assert bits["kakeyalattice E8 q6"] == (64 / 8 * 30 + 32) / 64  # ceil(8 log2 13) = 30
    assert bits["kakeyalattice D4 q2"] == (64 / 4 * 9 + 32) / 64  # ceil(4 log2 5 - 1) = 9


@pytest.mark.parametrize("package", packages.PACKAGES)
def test_packages_change_what_is_read_and_less_with_more_bits(package):
    model = tiny_model(kv_heads=1)
    own = [it for it in found(package, model) if it.within_pass == "quantized"]
    windows = random_windows(1, 384)
    records = fidelity(model, windows, own, protocol=Protocol(128, 64, 64))
    records.sort(key=lambda record: record["true_bits"])
    assert {record["prefill"] for record in records} == {"quantized"}
    assert 0 < records[-1]["kld"]["value"] < records[0]["kld"]["value"]


def test_turboquant_keeps_its_window_exactly():
    model = FakeModel()
    for own in found("turboquant", model):
        states = torch.randn(1, 2, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
        keys, _ = own.make_cache().update(states, states, 0)
        same = (keys == states).all(-1).all(1).sum()
        assert same == own.settings["residual_len"]
