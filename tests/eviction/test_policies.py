"""Every policy's scores against its paper's formula, written out in loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvloom import eviction
from kvloom.errors import PlanError
from kvloom.eviction import (
    H2O,
    AdaKV,
    ExpectedAttention,
    KeyNorm,
    Policy,
    PyramidKV,
    Reading,
    SnapExpected,
    SnapKV,
    StreamingLLM,
)
from kvloom.eviction import _seen as room_of_seen
from kvloom.testing import check_policy
from tests.eviction.samples import KV_HEADS, QUERY_HEADS, SCALING, layer, seen, slow_received


@pytest.mark.parametrize("name", eviction.names())
def test_a_good_citizen(name: str) -> None:
    check_policy(eviction.make(name, {}))


def test_streaming_llm_keeps_the_newest() -> None:
    policy = StreamingLLM()
    scores = policy.scores(seen(policy, **layer(9)))
    assert scores.argsort(descending=True)[0, 0].tolist() == list(range(8, -1, -1))
    assert (policy.min_sinks, policy.evicts_while_decoding) == (4, True)
    assert not StreamingLLM(decode=False).evicts_while_decoding


@pytest.mark.parametrize(
    "reading", [Reading(SCALING), Reading(0.3, softcap=2.0), Reading(SCALING, sink_logits=torch.linspace(-1, 2, 6))]
)
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_attention_received_is_that_of_a_loop(monkeypatch, reading: Reading, block: int) -> None:
    monkeypatch.setattr(room_of_seen, "SCORE_BLOCK", block)
    parts, last = layer(14, batch=2, padding=5), 6
    tokens = seen(SnapKV(window=last), reading=reading, **parts)
    expected = slow_received(parts["queries"], parts["keys"], parts["real"], reading, last)
    torch.testing.assert_close(tokens.received(), expected, atol=1e-5, rtol=1e-5)
    assert bool((tokens.received()[1, :, :5] == 0).all())


def test_no_matrix_of_all_queries_and_all_tokens_is_made(monkeypatch) -> None:
    monkeypatch.setattr(room_of_seen, "SCORE_BLOCK", 6 * 2000 * 8)
    sizes, weights = [], room_of_seen._weights

    def measured(*args) -> torch.Tensor:
        sizes.append(weights(*args).numel())
        return weights(*args)

    monkeypatch.setattr(room_of_seen, "_weights", measured)
    seen(SnapKV(window=2000), **layer(2000)).received()
    assert len(sizes) == 250
    assert max(sizes) <= 6 * 2000 * 8


def test_no_query_sees_the_future() -> None:
    parts = layer(12)
    whole = seen(SnapKV(window=12), **parts).received()
    assert float(whole[0, 0, -1]) < 1.01  # the last token is seen by the last query alone
    changed = {**parts, "keys": parts["keys"].clone()}
    changed["keys"][:, :, -1] *= 50
    now = seen(SnapKV(window=12), **changed).received()
    ours, theirs = (seen(SnapKV(window=12), **x) for x in (parts, changed))
    assert ours.received().shape == now.shape
    first = [
        eviction.received(
            parts["queries"][:, :, :11], x.keys[:, :, :11], x.slots[..., :11], x.is_real[..., :11], x.reading
        )
        for x in (ours, theirs)
    ]
    assert first[0].equal(first[1])


def test_h2o_sums_over_every_query() -> None:
    parts = layer(10, batch=2, padding=3)
    policy = H2O()
    expected = slow_received(parts["queries"], parts["keys"], parts["real"], Reading(SCALING))
    torch.testing.assert_close(policy.scores(seen(policy, **parts)), expected)
    assert policy.newest(100) == 50
    assert H2O(recent=8).newest(100) == 8


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_snapkv_pools_what_the_window_looks_at(pooling: str) -> None:
    parts, policy = layer(13), SnapKV(window=4, kernel=3, pooling=pooling)
    alone = slow_received(parts["queries"], parts["keys"], parts["real"], Reading(SCALING), 4)
    padded = torch.nn.functional.pad(alone[..., :-4], (1, 5))
    triples = torch.stack([padded[..., i : i + 13] for i in range(3)])
    expected = triples.amax(0) if pooling == "max" else triples.mean(0)
    torch.testing.assert_close(policy.scores(seen(policy, **parts)), expected, atol=1e-5, rtol=1e-5)
    assert policy.newest(999) == 4


def test_key_norm_prefers_small_keys() -> None:
    parts, policy = layer(8), KeyNorm()
    worst = policy.scores(seen(policy, **parts))[0, 1].argmin()
    assert int(worst) == int(parts["keys"][0, 1].norm(dim=-1).argmax())


def test_expected_attention_is_the_mean_over_many_drawn_queries() -> None:
    parts, policy = layer(12, batch=2, padding=4), ExpectedAttention(window=12)
    scores = policy.scores(seen(policy, **parts))
    generator = torch.Generator().manual_seed(3)
    for b in range(2):
        real = parts["real"][b]
        for h in range(KV_HEADS):
            total = torch.zeros(int(real.sum()), dtype=torch.float64)
            keys, values = (parts[x][b, h, real].double() for x in ("keys", "values"))
            group = QUERY_HEADS // KV_HEADS
            for q in range(h * group, (h + 1) * group):
                own = parts["queries"][b, q, real].double()
                centred = own - own.mean(0)
                factors = torch.randn(200_000, len(own), generator=generator, dtype=torch.float64)
                drawn = own.mean(0) + factors @ centred / math.sqrt(len(own))
                weights = (drawn @ keys.T * 0.05).exp().mean(0)
                total += weights / weights.sum() / group
            expected = (total * values.norm(dim=-1)).float()
            shown = seen(policy, reading=Reading(0.05), **parts)
            torch.testing.assert_close(policy.scores(shown)[b, h, real], expected, atol=0, rtol=0.02)
    assert bool(scores[1, :, :4].eq(0).all())


@pytest.mark.parametrize("observed", [1, 4, 12])
def test_snap_expected_adds_what_is_observed_and_what_is_expected(observed: int) -> None:
    parts, policy = layer(13, batch=2, padding=4), SnapExpected(window=12, observed=observed)
    alone = slow_received(parts["queries"], parts["keys"], parts["real"], Reading(SCALING), observed)
    alone[..., 13 - observed :] = 0
    expected = ExpectedAttention(window=12)
    shown = seen(expected, **parts)
    worth = expected.scores(shown) / parts["values"].norm(dim=-1)
    torch.testing.assert_close(policy.scores(shown), alone / observed + worth, atol=1e-6, rtol=1e-5, check_dtype=False)
    assert policy.newest(999) == observed


@pytest.mark.parametrize("layers", [1, 2, 5, 30])
@pytest.mark.parametrize("budget", [40, 64, 333, 2048])
@pytest.mark.parametrize("tokens", [300, 2500, 10**6])
def test_pyramid_budgets_add_up_and_fall(layers: int, budget: int, tokens: int) -> None:
    budgets = [PyramidKV().layer_budget(budget, n, layers, tokens, 12) for n in range(layers)]
    assert sum(budgets) == layers * budget
    assert min(budgets) >= 12
    assert budgets[0] >= budgets[-1]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(budgets))
    if tokens > budget:
        assert max(budgets) <= tokens


def test_the_first_layer_of_a_pyramid_has_nearly_twice_the_mean() -> None:
    budgets = [PyramidKV().layer_budget(1008, n, 32, 10**6, 8) for n in range(32)]
    assert (budgets[0], budgets[-1]) == (1958, 58)


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("topkek", {}, r"policy 'topkek' is unknown; choose one of .*snapkv"),
        ("snapkv", {"kernel": 4}, "policy 'snapkv': kernel: 4 is even"),
        ("snap_expected", {"window": 8, "observed": 9}, "observed is 9, window 8"),
        ("snapkv", {"window": 0}, "policy 'snapkv': window: .*greater than or equal to 1"),
        ("snapkv", {"heads": 3}, r"heads: nothing is known by this name: it takes \['kernel', 'pooling', 'window'\]"),
        ("adakv", {"alpha": 2.0}, "policy 'adakv': alpha: .*less than or equal to 1"),
        ("h2o", {"recent": "all"}, "policy 'h2o': recent: .*valid integer"),
    ],
)
def test_bad_parameters_are_named(name: str, parameters: dict, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        eviction.make(name, parameters)


@pytest.mark.parametrize("name", eviction.presets())
def test_presets_are_policies(name: str) -> None:
    policy, parameters = eviction.preset(name)
    made = eviction.make(policy, parameters)
    assert made.num_queries in (0, 8)
    assert not made.evicts_while_decoding
    parameters.clear()
    assert eviction.preset(name)[1]


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(PlanError, match=r"eviction preset 'x' is unknown; choose one of .*qpruningkv/snapkv"):
        eviction.preset("x")


def test_registering_is_undone() -> None:
    class Own(KeyNorm):
        name = "snapkv"

    class New(KeyNorm):
        name = "new"

    with eviction.registered(Own), eviction.registered(New):
        assert isinstance(eviction.make("snapkv", {}), Own)
        assert isinstance(eviction.make("new", {}), New)
    assert isinstance(eviction.make("snapkv", {}), SnapKV)
    assert "new" not in eviction.names()


def test_heads_compete_only_where_said() -> None:
    kinds: list[type[Policy]] = [StreamingLLM, H2O, SnapKV, PyramidKV, KeyNorm, ExpectedAttention]
    assert not any(kind.is_pooled for kind in kinds)
    assert AdaKV.is_pooled
    assert AdaKV().safeguard == 0.2
