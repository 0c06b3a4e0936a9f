"""`bench_serve` against a server of known delays: counts, times, ratios, and what is said when something breaks."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from kvloom.bench import Traffic, bench_serve, serve_tables
from kvloom.bench.serving._serve import _figures, _percentiles
from kvloom.errors import DataError, ServerError
from kvloom.evaluate import pieces_path
from tests.bench.serving.fake import Fake, served

EIGHT = (Traffic(concurrency=4),)
REQUESTS, NEW = 8, 5


def prompts(count: int = REQUESTS + 1) -> list[list[int]]:
    return [[n, 1, 2, 3] for n in range(count)]


def measured(fake: Fake, traffic: tuple[Traffic, ...] = EIGHT, **options) -> list[dict]:
    with served(fake) as url:
        return bench_serve({"a": url}, prompts(REQUESTS * len(traffic) + 1), traffic, new_tokens=NEW, **options)


def times(record: dict, name: str) -> list[float]:
    return [record[name][percentile] for percentile in ("p50", "p90", "p99")]


def test_every_request_is_sent_once_and_all_its_tokens_are_counted():
    fake = Fake()
    (record,) = measured(fake)
    named = tuple(record[name] for name in ("kind", "server", "model", "traffic"))
    assert named == ("serve", "a", "tiny", "4 at a time")
    assert (record["requests"], record["prompt_tokens"], record["new_tokens"]) == (REQUESTS, 4, NEW)
    assert record["output_tokens"] == REQUESTS * NEW
    assert record["requests_per_s"] == pytest.approx(REQUESTS / record["duration_s"])
    assert record["output_tokens_per_s"] == pytest.approx(REQUESTS * NEW / record["duration_s"])
    warm_up, *asked = fake.asked
    assert warm_up["prompt"] == prompts()[-1]
    assert sorted(body["prompt"] for body in asked) == prompts(REQUESTS)
    wanted = {"model": "tiny", "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True}
    assert all(body | wanted == body for body in asked)


def test_tokens_are_those_that_the_server_counts_or_else_pieces_of_the_stream():
    (several,) = measured(Fake(extra=3))
    assert several["output_tokens"] == 3 * REQUESTS * NEW
    (uncounted,) = measured(Fake(usage=False))
    assert uncounted["output_tokens"] == REQUESTS * NEW


def test_times_are_those_of_the_server():
    fake = Fake(first_s=0.06, gap_s=0.03)
    (record,) = measured(fake)
    for name, least in (("first_token_s", 0.06), ("inter_token_s", 0.03), ("latency_s", 0.06 + 4 * 0.03)):
        found = times(record, name)
        assert found == sorted(found)
        assert least * 0.9 < found[0] < 5 * least
    assert record["duration_s"] > 2 * (0.06 + 4 * 0.03)  # two rounds of four
    assert fake.most == 4


def test_percentiles_are_exact():
    assert _percentiles([float(n) for n in range(101)]) == {"p50": 50, "p90": 90, "p99": 99}
    assert _percentiles([3.0, 1.0]) == {"p50": 2, "p90": 2.8, "p99": 2.98}
    assert _percentiles([]) is None


def test_rates_count_the_time_in_which_requests_were_under_way():
    """Two sessions: from 100 to 103 and from 1,000 to 1,002 seconds."""
    own = {"first_s": 0.5, "gaps_s": [0.1], "output_tokens": 10}
    pieces = [
        {"session": "a", "sent": 100.0, "total_s": 2.0, **own},
        {"session": "a", "sent": 101.0, "total_s": 2.0, **own},
        {"session": "b", "sent": 1000.0, "total_s": 2.0, **own},
    ]
    figures = _figures(pieces)
    assert (figures["duration_s"], figures["requests_per_s"], figures["output_tokens_per_s"]) == (5, 3 / 5, 30 / 5)
    assert figures["latency_s"] == {"p50": 2, "p90": 2, "p99": 2}


def test_one_token_a_request_has_no_times_between():
    with served(Fake()) as url:
        (record,) = bench_serve({"a": url}, prompts(), EIGHT, new_tokens=1)
    assert record["inter_token_s"] is None
    assert record["times_first"]["inter_token_s"] is None
    assert "-" in serve_tables([record])[0].rows[0]


def test_requests_come_at_a_rate_whatever_is_under_way():
    fake = Fake(first_s=1.0)
    traffic = Traffic(rate=10.0)
    (record,) = measured(fake, (traffic,), seed=3)
    moments, (_, *came) = traffic.moments(REQUESTS, 3), fake.arrived
    offsets = [moment - moments[0] for moment in moments]
    assert [moment - came[0] for moment in came] == pytest.approx(offsets, abs=0.15)
    assert offsets[-1] > 0.5
    assert fake.most > 4
    assert (record["concurrency"], record["rate"], record["traffic"]) == (None, 10.0, "10 a second")


def test_servers_are_compared_with_the_first_one():
    traffic = (Traffic(concurrency=1), Traffic(concurrency=4))
    slow, fast = Fake(first_s=0.08, gap_s=0.02), Fake(first_s=0.02, gap_s=0.005)
    with served(slow) as one, served(fast) as two:
        servers = {"slow": one + "/v1/", "fast": two}
        records = bench_serve(servers, prompts(2 * REQUESTS + 1), traffic, new_tokens=NEW)
    order = [("1 at a time", "slow"), ("1 at a time", "fast"), ("4 at a time", "slow"), ("4 at a time", "fast")]
    assert [(record["traffic"], record["server"]) for record in records] == order
    assert len({record["id"] for record in records}) == 4
    for first, other in (records[:2], records[2:]):
        assert set(first["times_first"].values()) == {1.0}
        assert other["times_first"]["requests_per_s"] == other["requests_per_s"] / first["requests_per_s"] > 1
        ratio = first["first_token_s"]["p50"] / other["first_token_s"]["p50"]
        assert other["times_first"]["first_token_s"] == ratio > 1
    assert [body["prompt"] for body in slow.asked[1 : REQUESTS + 1]] == prompts(REQUESTS)
    tables = serve_tables(records)
    assert [table.title for table in tables] == [
        f"tiny, {way}: 8 requests of 4 + 5 tokens" for way in ("1 at a time", "4 at a time")
    ]
    assert [row[0] for row in tables[0].rows] == ["slow", "fast"]
    assert len({len(table.headings) for table in tables} | {len(row) for table in tables for row in table.rows}) == 1
    assert tables[0].notes[0] == f"slow: {one}"


@pytest.mark.parametrize("fault", ["cut", "end", "error"])
def test_a_stream_that_breaks_is_one_sentence_and_finished_requests_are_kept(tmp_path: Path, fault: str):
    out, fake = tmp_path / "runs" / "serve.jsonl", Fake(fault=fault, faulty=(6,))
    said = {
        "cut": "cut a stream short after 2 pieces",
        "end": "after 5 pieces",
        "error": "gave up a request: out of pages",
    }
    with served(fake) as url:
        with pytest.raises(ServerError, match=said[fault]) as raised:
            bench_serve({"a": url}, prompts(), (Traffic(concurrency=1),), new_tokens=NEW, out=out)
        assert "\n" not in str(raised.value)
        assert not out.exists()
        kept = [json.loads(line) for line in pieces_path(out).read_text().splitlines()]
        assert len(kept) == 5
        assert len(fake.asked) == 7
        (record,) = bench_serve({"a": url}, prompts(), (Traffic(concurrency=1),), new_tokens=NEW, out=out)
    again = [body["prompt"] for body in fake.asked[7:]]
    assert again == [prompts()[-1], *prompts()[5:8]]
    assert record["output_tokens"] == REQUESTS * NEW
    assert json.loads(out.read_text()) == record
    assert not pieces_path(out).exists()


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (Fake(fault="status"), r"server a \(http.*\) answers with status 400: max_tokens is too large\.$"),
        (Fake(fault="json"), "does not stream completions: .*application/json"),
        (Fake(fault="silent"), "cut a stream short after 0 pieces"),
        (Fake(fault="nonsense"), "does not speak the OpenAI protocol"),
        (Fake(models=("b", "c")), r"serves b, c: say which \(--served-name\)"),
        (Fake(models=()), "serves nothing: say which"),
    ],
)
def test_answers_that_are_no_completions(fake: Fake, message: str):
    with pytest.raises(ServerError, match=message):
        measured(fake)


def test_the_model_is_one_that_is_served():
    with pytest.raises(ServerError, match="serves b, c and not 'tiny': correct --served-name"):
        measured(Fake(models=("b", "c")), model="tiny")
    (record,) = measured(Fake(models=("b", "c")), model="c")
    assert record["model"] == "c"


def test_a_server_that_is_away():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"server a is not there at http.*: start it, or correct its address"):
            bench_serve({"a": url}, prompts(), EIGHT)
    with pytest.raises(ServerError, match="is not there at nonsense"):
        bench_serve({"a": "nonsense"}, prompts(), EIGHT)


@pytest.mark.parametrize(
    ("servers", "given", "traffic", "new_tokens"),
    [
        ({}, prompts(), EIGHT, 1),
        ({"a": "http://x"}, prompts(), (), 1),
        ({"a": "http://x"}, prompts(1), EIGHT, 1),
        ({"a": "http://x"}, prompts(8), (Traffic(1), Traffic(2)), 1),
        ({"a": "http://x"}, [[1], [1, 2]], EIGHT, 1),
        ({"a": "http://x"}, prompts(), EIGHT, 0),
    ],
)
def test_nothing_to_measure(servers: dict, given: list, traffic: tuple, new_tokens: int):
    with pytest.raises(DataError, match="give"):
        bench_serve(servers, given, traffic, new_tokens=new_tokens)
