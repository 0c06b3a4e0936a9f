"""Speed of a running OpenAI-compatible server, as its users see it."""

from __future__ import annotations

from kvloom.bench.serving._prompts import draw_prompts
from kvloom.bench.serving._serve import against_first, bench_serve
from kvloom.bench.serving._table import serve_tables
from kvloom.bench.serving._traffic import Traffic, make_traffic

__all__ = ["Traffic", "against_first", "bench_serve", "draw_prompts", "make_traffic", "serve_tables"]
