"""A small server that speaks as much of the OpenAI protocol as is asked, with known delays and mistakes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fake:
    """What the server does, and what it was asked.

    Attributes:
        models: Names of the models it has.
        first_s: Seconds before the first token.
        gap_s: Seconds before each other one.
        usage: Whether it says how many tokens it has generated.
        extra: Tokens per piece of the stream, as ``usage`` counts them.
        fault: ``cut`` (the connection is closed amid the stream), ``end`` (the stream ends without a word), ``error``
            (an error amid the stream), ``silent`` (no tokens), ``json`` (no stream), ``status`` (an error answer), or
            ``nonsense``.
        faulty: Numbers of the completions, from 0 on, that have the fault; None for all.
        asked: Bodies of the completions, in the order in which they came.
        most: Most completions that were under way at a time.
    """

    models: tuple[str, ...] = ("tiny",)
    first_s: float = 0.0
    gap_s: float = 0.0
    usage: bool = True
    extra: int = 1
    fault: str | None = None
    faulty: tuple[int, ...] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    most: int = 0
    _under_way: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def enter(self, body: dict[str, Any]) -> str | None:
        """Note a completion; its fault."""
        with self._lock:
            number = len(self.asked)
            self.asked.append(body)
            self.arrived.append(time.perf_counter())
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        return self.fault if self.faulty is None or number in self.faulty else None

    def leave(self) -> None:
        with self._lock:
            self._under_way -= 1


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            known = self.path == "/v1/models" and fake.fault != "nonsense"
            self._answer(200, {"data": [{"id": name} for name in fake.models]} if known else {"hello": "world"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = fake.enter(body)
            try:
                self._complete(body, fault)
            finally:
                fake.leave()

        def _complete(self, body: dict[str, Any], fault: str | None) -> None:
            if fault == "status":
                return self._answer(400, {"error": {"message": "max_tokens is too large."}})
            if fault == "json":
                return self._answer(200, {"choices": [{"text": "all at once"}]})
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            time.sleep(fake.first_s)
            for n in range(body["max_tokens"] * (fault != "silent")):
                if n:
                    time.sleep(fake.gap_s)
                if n == 2 and fault == "cut":
                    self.close_connection = True
                    return None
                if n == 2 and fault == "error":
                    self._event(json.dumps({"error": {"message": "out of pages"}}))
                self._event(json.dumps({"choices": [{"text": f" {n}", "finish_reason": None}], "usage": None}))
            if fault != "end":
                self._event(json.dumps({"choices": [{"text": "", "finish_reason": "length"}]}))
                if fake.usage:
                    tokens = fake.extra * body["max_tokens"]
                    self._event(json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}))
                self._event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
            return None

        def _event(self, data: str) -> None:
            chunk = f"data: {data}\n\n".encode()
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.flush()

        def _answer(self, status: int, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    """The address of the server, which runs within the context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
