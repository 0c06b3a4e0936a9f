from __future__ import annotations

import random
from typing import Any

import pytest

from kvloom.report._compare import _t95, compare, front
from kvloom.report._headline import Headline, build_headline
from kvloom.report._runs import Run, group_runs
from tests.report.synthetic import Record, full_records


def scored(name: str, method: str, bits: float, kld: float, width: float = 0.1, **more: Any) -> Record:
    return {
        "kind": "fidelity",
        "name": name,
        "method": method,
        "true_bits": bits,
        "kld": {"value": kld, "low": kld * (1 - width), "high": kld * (1 + width)},
        "prefill": "quantized",
        **more,
    }


def run(*records: Record) -> Run:
    (only,) = group_runs(records)
    return only


def headline(*records: Record) -> Headline:
    return build_headline(run(*records))


def test_the_full_set_is_summed_up() -> None:
    found = headline(*full_records())
    assert found.lead.startswith("At 2.50 true bits, the exact plan’s KLD is 3.")
    assert found.lead.endswith("× below that of the best QuantizedCache scored here, at 2.71.")
    assert "exact 2.5: KLD 0.212 [0.197, 0.227]; quanto 2-bit, keys per channel: KLD 0.655" in found.findings[0]
    assert "paired over 128 blocks" in found.findings[0]
    assert found.findings[1].startswith("Against QuantizedCache: lower KLD at 2 of 2")
    assert found.findings[2].startswith("Against uniform plans: lower KLD at 5 of 5")
    assert found.findings[3].startswith("Against KVmix’s rule: lower KLD at 3 of 3")
    assert found.findings[4] == "exact 2.5 takes 6.40× less memory than a 16-bit cache."
    assert "Scored on 16,384 tokens" in found.protocol


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (0.1, 0.3, "3.00× below that of"),
        (0.3, 0.1, "3.00× above that of"),
        (0.1, 0.11, "not distinguishable from that of"),
    ],
)
def test_the_sentence_follows_the_records(ours: float, theirs: float, words: str) -> None:
    found = headline(scored("exact 3", "exact", 3.0, ours), scored("uniform 3", "uniform", 3.0, theirs))
    assert (
        found.lead == f"At 3.00 true bits, the exact plan’s KLD is {words} the best uniform plan scored here, at 3.00."
    )


def test_better_worse_and_unclear_points_are_all_told() -> None:
    points = [(2.0, 0.1, 0.4), (3.0, 0.1, 0.05), (4.0, 0.01, 0.0101)]
    exact = [scored(f"exact {bits}", "exact", bits, kld) for bits, kld, _ in points]
    uniform = [scored(f"uniform {bits}", "uniform", bits, kld) for bits, _, kld in points]
    (told,) = [text for text in headline(*exact, *uniform).findings if text.startswith("Against")]
    assert "lower KLD at 1 of 3 comparable points, by 4.00×" in told
    assert "higher KLD at 1 of 3 comparable points, by 2.00×" in told
    assert "not distinguishable at 1 of 3" in told


def test_a_plan_with_more_bits_is_never_compared() -> None:
    ours, theirs = scored("exact 3", "exact", 3.03, 0.1), scored("uniform 3", "uniform", 3.0, 0.3)
    assert compare(run(ours, theirs), "uniform") == []
    assert compare(run({**ours, "true_bits": 3.01}, theirs), "uniform")
    assert compare(run({**ours, "true_bits": 2.4}, theirs), "uniform") == []


@pytest.mark.parametrize(
    ("ours", "theirs", "fair"),
    [
        ("quantized", "chunk-exact", True),
        ("quantized", "quantized", True),
        ("chunk-exact", "quantized", False),
        ("exact", "chunk-exact", False),
        ("made up", "quantized", False),
        ("quantized", "made up", False),
        ("made up", "made up", True),
    ],
)
def test_an_easier_protocol_earns_no_claim(ours: str, theirs: str, fair: bool) -> None:
    records = (
        scored("exact 3", "exact", 3.0, 0.1, prefill=ours),
        scored("quanto", "quanto", 3.0, 0.3, prefill=theirs),
    )
    assert bool(compare(run(*records), "quanto")) is fair


def test_only_the_best_configurations_of_a_rival_take_part() -> None:
    records = (
        scored("exact 3", "exact", 3.0, 0.1),
        scored("quanto as it comes", "quanto", 3.2, 4.0),
        scored("quanto best", "quanto", 3.1, 0.3),
        scored("hqq", "hqq", 3.1, 0.2),
    )
    (found,) = compare(run(*records), "quanto", "hqq")
    assert found.rival.name == "hqq"
    assert [row.name for row in front(run(*records).of("quanto"))] == ["quanto best"]


def test_different_texts_are_never_compared() -> None:
    ours = scored("exact 3", "exact", 3.0, 0.1, text={"sha256": "one"})
    theirs = scored("uniform 3", "uniform", 3.0, 0.3, text={"sha256": "two"})
    assert len(group_runs([ours, theirs])) == 2


def blocks(values: list[float], tokens: list[int] | None = None) -> Record:
    return {"size": 128, "kld": values} | ({"tokens": tokens} if tokens else {})


def test_paired_blocks_tell_apart_what_marginal_intervals_cannot() -> None:
    rng = random.Random(1)
    hard = [rng.lognormvariate(0, 1) for _ in range(64)]
    ours = scored("exact 3", "exact", 3.0, sum(hard) / 64, 0.4, blocks=blocks(hard))
    worse = [1.2 * kld * rng.uniform(0.95, 1.05) for kld in hard]
    theirs = scored("uniform 3", "uniform", 3.0, sum(worse) / 64, 0.4, blocks=blocks(worse))
    (paired,) = compare(run(ours, theirs), "uniform")
    assert (paired.verdict, paired.blocks) == ("below", 64)
    assert paired.ratio.value == pytest.approx(1.2, rel=0.02)
    (marginal,) = compare(run({**ours, "blocks": None}, theirs), "uniform")
    assert (marginal.verdict, marginal.basis) == ("unclear", "from the two intervals")


def test_the_paired_interval_covers_the_truth() -> None:
    rng = random.Random(7)
    covered = 0
    for _ in range(300):
        hard = [rng.lognormvariate(0, 0.5) for _ in range(12)]
        ours = [kld * rng.lognormvariate(0, 0.2) for kld in hard]
        theirs = [2 * kld * rng.lognormvariate(0, 0.2) for kld in hard]
        pair = (
            scored("exact 3", "exact", 3.0, 1.0, blocks=blocks(ours)),
            scored("uniform 3", "uniform", 3.0, 2.0, blocks=blocks(theirs)),
        )
        low, high = compare(run(*pair), "uniform")[0].ratio.bounds or (0, 0)
        covered += low <= 2 <= high
    assert 270 <= covered <= 296


def test_blocks_weigh_by_their_tokens() -> None:
    long = [0.1] * 8 + [9.0]
    tokens = [128] * 8 + [1]
    ours = scored("exact 3", "exact", 3.0, 0.1, blocks=blocks([0.1] * 9, tokens))
    theirs = scored("uniform 3", "uniform", 3.0, 0.1, blocks=blocks(long, tokens))
    (found,) = compare(run(ours, theirs), "uniform")
    assert found.ratio.value == pytest.approx((8 * 128 * 0.1 + 9.0) / (1025 * 0.1))


def test_students_t() -> None:
    assert [_t95(freedom) for freedom in (7, 10, 30)] == pytest.approx([2.3646, 2.2281, 2.0423], abs=0.01)


def test_without_an_exact_plan_nothing_is_claimed_for_it() -> None:
    found = headline(scored("uniform 3", "uniform", 3.0, 0.1), scored("kvmix 3", "kvmix", 3.1, 0.09))
    assert found.lead == "uniform 3 holds 3.00 true bits at a mean KLD of 0.100."
    assert found.findings == ()
    assert headline({"kind": "fidelity", "name": "dense", "method": "dense"}).lead.startswith("1 cache was scored")
