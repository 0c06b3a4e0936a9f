"""One server and one request: the completions of the OpenAI protocol, streamed as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter, time
from types import ModuleType
from typing import Any

from kvloom._extras import require
from kvloom.errors import ServerError

_END = "[DONE]"
_CONNECT_S, _SILENCE_S = 10.0, 600.0


@dataclass(frozen=True)
class Reply:
    """What came back, and when.

    Attributes:
        sent: When the request was sent, in Unix seconds.
        first_s: Seconds from then to the first tokens.
        gaps_s: Seconds between pieces of the stream, which hold a token each, or several if the server says so.
        total_s: Seconds to the end of the stream.
        output_tokens: As the server counts them; pieces of the stream if it does not.
    """

    sent: float
    first_s: float
    gaps_s: tuple[float, ...]
    total_s: float
    output_tokens: int


@dataclass(frozen=True)
class Server:
    """A server and the client that asks it.

    Attributes:
        name: In tables and messages.
        url: Without ``/v1``.
        client: ``httpx2.AsyncClient``.
    """

    name: str
    url: str
    client: Any

    async def models(self) -> list[str]:
        """Names of the models that it serves.

        Raises:
            ServerError: It is away, or does not speak the protocol.
        """
        with self._spoken():
            answer = await self.client.get(f"{self.url}/v1/models")
            self._check(answer.status_code, answer.text)
            return [str(model["id"]) for model in answer.json()["data"]]

    async def complete(self, model: str, prompt: Sequence[int], new_tokens: int) -> Reply:
        """Stream a greedy completion that does not stop early.

        Args:
            model: As the server calls it.
            prompt: Token ids.
            new_tokens: Tokens to generate. ``ignore_eos``, which vLLM and SGLang know, asks for all of them.

        Raises:
            ServerError: The server is away, answers with an error, or cuts the stream short.
        """
        asked = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        marks: list[float] = []
        counted = end = None
        sent, start = time(), perf_counter()
        with self._spoken(marks):
            async with self.client.sse(f"{self.url}/v1/completions", method="POST", json=asked) as events:
                if events.response.status_code != 200:
                    self._check(events.response.status_code, (await events.response.aread()).decode(errors="replace"))
                async for event in events:
                    if event.data == _END:
                        end = perf_counter()  # and go on: a connection that is read to its end serves the next request
                        continue
                    piece = json.loads(event.data)
                    if "error" in piece:
                        raise ServerError(f"server {self.name} gave up a request: {_message(piece)}.")
                    counted = (piece.get("usage") or {}).get("completion_tokens", counted)
                    if any(_says_something(choice) for choice in piece["choices"]):
                        marks.append(perf_counter())
        if end is None or not marks:
            raise self._cut(len(marks))
        gaps = tuple(after - before for before, after in pairwise(marks))
        return Reply(sent, marks[0] - start, gaps, end - start, counted or len(marks))

    def _check(self, status: int, text: str) -> None:
        if status != 200:
            raise ServerError(f"server {self.name} ({self.url}) answers with status {status}: {_reason(text)}.")

    def _cut(self, pieces: int) -> ServerError:
        return ServerError(
            f"server {self.name} ({self.url}) cut a stream short after {pieces} pieces: its log says why; finished "
            "requests are kept, so run the same command again."
        )

    @contextmanager
    def _spoken(self, marks: Sequence[float] | None = None) -> Iterator[None]:
        """Say errors of the connection and of the protocol in a sentence; ``marks`` of a stream that is under way."""
        httpx = httpx2()
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ServerError(
                f"server {self.name} is not there at {self.url} ({error}): start it, or correct its address."
            ) from None
        except httpx.SSEError as error:
            raise ServerError(f"server {self.name} ({self.url}) does not stream completions: {error}") from None
        except httpx.TransportError as error:
            if marks is not None:
                raise self._cut(len(marks)) from None
            raise ServerError(f"server {self.name} ({self.url}) breaks off: {error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ServerError(
                f"server {self.name} ({self.url}) does not speak the OpenAI protocol: give the address of one that has "
                "/v1/models and /v1/completions."
            ) from None


def httpx2() -> ModuleType:
    """The package that speaks HTTP.

    Raises:
        MissingExtraError: It is not installed.
    """
    return require("serve", "kvloom bench serve")


def open_client() -> Any:
    """An ``httpx2.AsyncClient`` for any number of streams at a time; no proxy stands between, which would be timed."""
    httpx = httpx2()
    return httpx.AsyncClient(
        timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )


def _says_something(choice: dict[str, Any]) -> bool:
    """Whether a piece of a stream holds a token; the last one may only say why the stream ends."""
    return bool(choice["text"]) or not choice.get("finish_reason")


def _reason(text: str) -> str:
    """What an error answer says."""
    try:
        return _message(json.loads(text))
    except ValueError:
        return text.strip().split("\n")[0].rstrip(".") or "nothing"


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    said = error.get("message", error) if isinstance(error, dict) else error
    return str(said).strip().split("\n")[0].rstrip(".")
