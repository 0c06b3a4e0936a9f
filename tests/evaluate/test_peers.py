"""QuantizedCache: which rows there are, and its bytes against hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from kvloom.errors import DataError
from kvloom.evaluate import Protocol, dense_contestant, fidelity, peer_contestants
from kvloom.evaluate import _peers as peers
from kvloom.evaluate._live import live_bytes, true_bits
from kvloom.plan import Fingerprint
from tests.evaluate.tiny_llama import random_windows, tiny_model

HEADS, DIM, LAYERS = 2, 64, 2


class FakeModel:
    """What peers need of a model."""

    def __init__(self, heads: int = HEADS) -> None:
        from transformers import LlamaConfig

        self.config = LlamaConfig(
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=heads,
            head_dim=DIM,
            hidden_size=4 * DIM,
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")


def filled(contestant, updates):
    cache = contestant.make_cache()
    generator = torch.Generator().manual_seed(0)
    for tokens in updates:
        for layer in range(LAYERS):
            states = torch.randn(1, HEADS, tokens, DIM, generator=generator)
            cache.update(states, states.clone(), layer)
    return cache


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axes", [0, 1])
def test_bytes_are_codes_scales_shifts_and_the_exact_tail(backend, bits, axes):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model = FakeModel()
    if problem := peers.why_not(backend, model):
        pytest.skip(problem)
    shape = Fingerprint.of(model)
    contestant = peers.quantized_contestant(model, backend, peers.BACKENDS[backend][axes], bits)

    cache = filled(contestant, [256])
    elements = 2 * LAYERS * HEADS * 256 * DIM
    codes, groups = elements * bits // 8, elements // 64
    assert true_bits(contestant, cache, shape) == bits + 2 * 16 / 64  # 16-bit scale and zero
    assert live_bytes(contestant, cache, shape) == codes + groups * 2 * 4  # kept in float32 here

    cache = filled(contestant, [256, 16])
    tail = 2 * LAYERS * HEADS * 16 * DIM
    expected = 8 * (codes + groups * 2 * 2 + tail * 2) / (elements + tail)
    assert true_bits(contestant, cache, shape) == pytest.approx(expected, rel=1e-12)
    assert live_bytes(contestant, cache, shape) == codes + groups * 2 * 4 + tail * 4


def test_the_dense_cache_has_16_true_bits_and_shared_storage_counts_once():
    model = FakeModel()
    contestant = dense_contestant(model)
    cache = filled(contestant, [100])
    shape = Fingerprint.of(model)
    assert true_bits(contestant, cache, shape) == 16
    assert live_bytes(contestant, cache, shape) == 2 * LAYERS * HEADS * 100 * DIM * 4
    cache.layers[1].keys = cache.layers[0].keys
    assert live_bytes(contestant, cache, shape) == 3 * HEADS * 100 * DIM * 4


def test_configurations_are_those_of_the_class(monkeypatch):
    """`as it comes` is what a user gets who sets nothing but the bits."""
    model = FakeModel()
    monkeypatch.setattr(peers, "why_not", lambda backend, model: None)
    found = peers.peer_contestants(model, bits=(4, 2))
    assert [c.name for c in found.contestants][:2] == ["quanto 4b, as it comes", "quanto 2b, as it comes"]
    assert len(found.contestants) == 8
    assert found.notes == ()
    for contestant in found.contestants:
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[contestant.method])
        layer = contestant.make_cache().layers[0]
        default = QuantizedCache(contestant.method, model.config, nbits=4).layers[0]
        same = (layer.axis_key, layer.axis_value) == (default.axis_key, default.axis_value)
        assert same == contestant.name.endswith("as it comes")
        assert (layer.q_group_size, layer.residual_length) == (64, default.residual_length)


def test_other_groups_have_their_name_and_a_backend_has_only_its_widths(monkeypatch):
    monkeypatch.setattr(peers, "why_not", lambda backend, model: None)
    found = peers.peer_contestants(FakeModel(), bits=(3, 4), groups=(64, 128)).contestants
    assert [c.name for c in found] == [
        "quanto 4b, as it comes",
        "quanto 4b, as it comes, groups of 128",
        "quanto 4b, best axes",
        "quanto 4b, best axes, groups of 128",
        "hqq 3b, as it comes",
        "hqq 3b, as it comes, groups of 128",
        "hqq 4b, as it comes",
        "hqq 4b, as it comes, groups of 128",
        "hqq 4b, best axes",
        "hqq 4b, best axes, groups of 128",
    ]
    assert [c.settings["q_group_size"] for c in found if c.method == "quanto"] == [64, 128] * 2


@pytest.mark.parametrize(
    ("backend", "axes", "bits", "stored"),
    [("quanto", 1, 2, 2), ("hqq", 1, 4, 4), ("hqq", 0, 3, 13 * 32 / 128)],
)
def test_larger_groups_store_fewer_scales_and_3_bits_are_packed_by_ten(backend, axes, bits, stored):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model = FakeModel()
    if problem := peers.why_not(backend, model):
        pytest.skip(problem)
    contestant = peers.quantized_contestant(model, backend, peers.BACKENDS[backend][axes], bits, 128)
    assert true_bits(contestant, filled(contestant, [512, 128]), Fingerprint.of(model)) == stored + 2 * 16 / 128


@pytest.mark.parametrize("backend", peers.BACKENDS)
def test_every_width_of_a_configuration_can_be_read_again(backend):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model = FakeModel()
    if problem := peers.why_not(backend, model):
        pytest.skip(problem)
    states = torch.randn(1, HEADS, 128, DIM, generator=torch.Generator().manual_seed(0))
    for configuration in peers.BACKENDS[backend]:
        for bits in configuration.widths:
            cache = peers.quantized_contestant(model, backend, configuration, bits, 128).make_cache()
            cache.update(states, states, 0)
            keys, _ = cache.update(states, states, 0)
            assert keys.shape[-2] == 256
            both = torch.stack([keys[:, :, :128].flatten(), states.flatten()])
            assert both.corrcoef()[0, 1] > 0.3


def test_a_cache_whose_tensors_do_not_tell_states_its_bits_and_how_a_pass_reads():
    model = FakeModel()
    floats = replace(dense_contestant(model), method="floats", stated_bits=lambda cache: cache.get_seq_length() / 40)
    cache, shape = filled(floats, [100]), Fingerprint.of(model)
    assert true_bits(floats, cache, shape) == 2.5
    assert live_bytes(floats, cache, shape) == 2 * LAYERS * HEADS * 100 * DIM * 4
    assert floats.prefill == "chunk-exact"
    assert replace(floats, within_pass="quantized").prefill == "quantized"


def test_an_absent_backend_is_one_sentence_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda extra: ("hqq",) if extra == "hqq" else ())
    monkeypatch.setattr(peers, "QuantizedCache", lambda *args, **kwargs: DynamicCache(config=FakeModel().config))
    found = peer_contestants(FakeModel())
    assert {c.method for c in found.contestants} == {"quanto"}
    (note,) = found.notes
    assert "kvloom[hqq]" in note
    assert note.count(".") == 1


def test_a_backend_that_fails_is_left_out_with_its_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("Error building extension 'quanto_cpp'\nlong log")

    monkeypatch.setattr(peers, "missing", lambda extra: ())
    monkeypatch.setattr(peers, "QuantizedCache", broken)
    found = peer_contestants(FakeModel())
    assert not found.contestants
    assert "(Error building extension 'quanto_cpp')." in found.notes[0]


@pytest.mark.parametrize(
    ("heads", "group", "multiple"), [(1, 64, 64), (2, 64, 32), (3, 64, 64), (64, 64, 1), (2, 128, 64), (3, 32, 32)]
)
def test_quanto_per_channel_keys_need_whole_groups(heads, group, multiple):
    model = FakeModel(heads=heads)
    best = peers.quantized_contestant(model, "quanto", peers.BACKENDS["quanto"][1], 2, group)
    plain = peers.quantized_contestant(model, "quanto", peers.BACKENDS["quanto"][0], 2, group)
    assert (best.token_multiple, plain.token_multiple) == (multiple, 1)


def test_lengths_that_do_not_fit_are_refused_before_any_work():
    model = tiny_model(kv_heads=1)
    best = peers.quantized_contestant(model, "quanto", peers.BACKENDS["quanto"][1], 2)
    with pytest.raises(DataError, match="multiples of 64 tokens only, and the chunk has 96"):
        fidelity(model, random_windows(1, 256), [best], protocol=Protocol(96, 64, 64))
    with pytest.raises(DataError, match="multiples of 64 tokens only, and the window has 200"):
        fidelity(model, random_windows(1, 200), [best], protocol=Protocol(64, 64, 64))


def test_a_rest_that_stays_exact_may_have_any_length():
    model = tiny_model(kv_heads=1)
    best = peers.quantized_contestant(model, "quanto", peers.BACKENDS["quanto"][1], 2)
    if problem := peers.why_not("quanto", model):
        pytest.skip(problem)
    (record,) = fidelity(model, random_windows(1, 260), [best], protocol=Protocol(128, 64, 64))
    shares = (256 * 2.5 + 4 * 16) / 260
    assert record["true_bits"] == pytest.approx(shares)
    assert record["blocks"]["tokens"] == [64, 64, 67]
