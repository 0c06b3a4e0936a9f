"""One run against servers: traffic by traffic, server by server, the same prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import torch

from kvloom._version import __version__
from kvloom.bench.serving._client import Server, open_client
from kvloom.bench.serving._traffic import Traffic
from kvloom.errors import DataError, ServerError
from kvloom.evaluate import Ledger, Progress, Record, fingerprint, pieces_path, silent, write_records

PERCENTILES = (50, 90, 99)
_WARM_UP_TOKENS = 8

Ask = Callable[[int], Awaitable[None]]


def bench_serve(
    servers: Mapping[str, str],
    prompts: Sequence[Sequence[int]],
    traffic: Sequence[Traffic],
    *,
    new_tokens: int = 128,
    model: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Measure requests and tokens a second, the time to the first token, and the times between tokens.

    Every server gets the same requests, each traffic others, after one that is not measured. A killed run goes on where
    it stopped: finished requests lie beside ``out`` until the run ends, and only the time in which requests were under
    way counts.

    Args:
        servers: Name -> address of an OpenAI-compatible server, with or without ``/v1``. The first one is what the
            others are compared with.
        prompts: Token ids of ``requests`` prompts for each traffic, and of one more to warm up with.
        traffic: How requests come.
        new_tokens: Generated tokens of each.
        model: As the servers call it; by default the only one a server has.
        seed: Of the moments at which requests come.
        out: Results file; records of the same cases are replaced.
        progress: Told after every request.

    Returns:
        A record of the kind ``serve`` for each traffic and server: ``first_token_s``, ``inter_token_s`` and
        ``latency_s`` (to the end of the stream) by percentile; ``times_first`` says how many times as good as the first
        server this one is, medians for times.

    Raises:
        ServerError: A server is away, does not serve the model, answers with an error, or cuts a stream short. Finished
            requests are kept.
        DataError: There is no server or traffic, the prompts are too few or of several lengths, or there are no new
            tokens; or ``out`` is not a results file.
        MissingExtraError: httpx2 is not installed.
    """
    requests, rest = divmod(len(prompts) - 1, max(1, len(traffic)))
    if not servers or not traffic or requests < 1 or rest or len({len(prompt) for prompt in prompts}) != 1:
        raise DataError(
            f"{len(servers)} servers, {len(traffic)} kinds of traffic, {len(prompts)} prompts: give one of each at "
            "least, and as many prompts of one length for every traffic, and one more."
        )
    if new_tokens < 1:
        raise DataError(f"{new_tokens} new tokens: give 1 at least.")
    run = _Run(prompts, traffic, requests, new_tokens, seed, out, progress)
    records = against_first(asyncio.run(run.records(servers, model)))
    if out:
        write_records(out, records)
        pieces_path(out).unlink(missing_ok=True)
    return records


class _Run:
    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        traffic: Sequence[Traffic],
        requests: int,
        new_tokens: int,
        seed: int,
        out: Path | None,
        progress: Progress,
    ) -> None:
        self._prompts, self._traffic, self._requests = prompts, traffic, requests
        self._new_tokens, self._seed, self._progress = new_tokens, seed, progress
        self._ledger = Ledger(pieces_path(out) if out else None)
        self._session = uuid4().hex[:20]

    async def records(self, servers: Mapping[str, str], model: str | None) -> list[Record]:
        """Every record; requests that were finished before the run was killed are not sent again."""
        async with open_client() as client:
            known = [Server(name, _address(url), client) for name, url in servers.items()]
            serving = [(server, _chosen(server, await server.models(), model)) for server in known]
            return [
                await self._record(n, traffic, server, served)
                for n, traffic in enumerate(self._traffic)
                for server, served in serving
            ]

    async def _record(self, n: int, traffic: Traffic, server: Server, model: str) -> Record:
        prompts = self._prompts[n * self._requests : (n + 1) * self._requests]
        case = {
            "server": server.name,
            "url": server.url,
            "model": model,
            "traffic": traffic.label,
            **asdict(traffic),
            "prompt_tokens": len(prompts[0]),
            "new_tokens": self._new_tokens,
            "requests": self._requests,
            "seed": self._seed,
        }
        keys = [fingerprint(["serve", case, prompt]) for prompt in prompts]

        async def ask(index: int) -> None:
            reply = await server.complete(model, prompts[index], self._new_tokens)
            self._ledger.add("serve_piece", keys[index], {"session": self._session, **asdict(reply)})
            self._progress(f"{traffic.label}, {server.name}", sum(key in self._ledger for key in keys), len(keys))

        missing = [index for index, key in enumerate(keys) if key not in self._ledger]
        if missing:
            await server.complete(model, self._prompts[-1], min(_WARM_UP_TOKENS, self._new_tokens))
            await _first_error(_send(traffic, missing, ask, self._seed))
        return {
            "kind": "serve",
            "id": fingerprint(case),
            **case,
            **_figures([self._ledger[key] for key in keys]),
            "kvloom": __version__,
            "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


async def _send(traffic: Traffic, indices: Sequence[int], ask: Ask, seed: int) -> None:
    async with asyncio.TaskGroup() as group:
        if traffic.concurrency is not None:
            waiting = iter(indices)
            for _ in range(traffic.concurrency):
                group.create_task(_one_by_one(waiting, ask))
            return
        start = asyncio.get_running_loop().time()
        for moment, index in zip(traffic.moments(len(indices), seed), indices, strict=True):
            await asyncio.sleep(start + moment - asyncio.get_running_loop().time())
            group.create_task(_awaited(ask(index)))


async def _one_by_one(waiting: Iterator[int], ask: Ask) -> None:
    for index in waiting:
        await ask(index)


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def _first_error(work: Awaitable[None]) -> None:
    """Raise the first error of a group of tasks as itself."""
    try:
        await work
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _figures(pieces: Sequence[Record]) -> Record:
    sessions: dict[str, list[Record]] = {}
    for piece in pieces:
        sessions.setdefault(piece["session"], []).append(piece)
    duration = sum(
        max(piece["sent"] + piece["total_s"] for piece in own) - min(piece["sent"] for piece in own)
        for own in sessions.values()
    )
    output_tokens = sum(piece["output_tokens"] for piece in pieces)
    return {
        "duration_s": duration,
        "requests_per_s": len(pieces) / duration,
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / duration,
        "first_token_s": _percentiles([piece["first_s"] for piece in pieces]),
        "inter_token_s": _percentiles([gap for piece in pieces for gap in piece["gaps_s"]]),
        "latency_s": _percentiles([piece["total_s"] for piece in pieces]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99, between neighbours in proportion; None of nothing."""
    if not seconds:
        return None
    wanted = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    found = torch.tensor(seconds, dtype=torch.float64).quantile(wanted).tolist()
    return {f"p{name}": value for name, value in zip(PERCENTILES, found, strict=True)}


def against_first(records: Sequence[Record]) -> list[Record]:
    """Records with ``times_first``: rates over the first server's under the same traffic, its times over these."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record["traffic"], record)
    return [{**record, "times_first": _times(record, first[record["traffic"]])} for record in records]


def _times(record: Record, first: Record) -> dict[str, float | None]:
    rates = {name: record[name] / first[name] for name in ("requests_per_s", "output_tokens_per_s")}
    times = {
        name: first[name]["p50"] / record[name]["p50"] if record[name] and first[name] else None
        for name in ("first_token_s", "inter_token_s", "latency_s")
    }
    return {**rates, **times}


def _address(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _chosen(server: Server, served: Sequence[str], wanted: str | None) -> str:
    """The model to ask for.

    Raises:
        ServerError: It is not served, or several are and none is wanted.
    """
    listed = ", ".join(served) or "nothing"
    if wanted is None and len(served) != 1:
        raise ServerError(f"server {server.name} ({server.url}) serves {listed}: say which (--served-name).")
    if wanted is not None and wanted not in served:
        raise ServerError(
            f"server {server.name} ({server.url}) serves {listed} and not {wanted!r}: correct --served-name."
        )
    return wanted or served[0]
