"""Speed of kernels, of `generate` and of servers, beside the best dense attention and transformers' caches of the run.

device = bench_device(None)
records = bench_kernels(make_grid(device, shapes="B8x32K", pairs="4:4,2:2"), device, out=Path("runs/kernels.jsonl"))
draw_roofline(records, Path("roofline.png"))

model = kvloom.assets.random_model("llama-3.1-8b", dtype=torch.bfloat16, device=device)
records = bench_generate(model, {"k4v2": plan}, make_loads("B1x8K,B*x32K"), fill="random")
capacity = fit(model.config, {"k4v2": plan}, memory=80 << 30, tokens=32768, dtype=torch.bfloat16)

servers = {"fp16": "http://localhost:8000", "k4v2": "http://localhost:8001"}
records = bench_serve(servers, draw_prompts(token_ids, 129, 512, seed=0), make_traffic("1,8", None))
"""

from __future__ import annotations

from kvloom.bench._backends import bench_backends
from kvloom.bench._grid import Grid, Pair, Shape, make_grid
from kvloom.bench._roofline import check_picture, draw_roofline
from kvloom.bench._run import bench_device, bench_kernels
from kvloom.bench._table import Table, tables
from kvloom.bench.generation import (
    KINDS,
    PRESETS,
    RESERVE,
    Capacity,
    Fit,
    Load,
    Preset,
    StepTimes,
    bench_generate,
    check_kinds,
    check_loads,
    fit,
    fit_table,
    generate_tables,
    is_out_of_memory,
    make_loads,
    make_preset,
    verify,
)
from kvloom.bench.serving import Traffic, bench_serve, draw_prompts, make_traffic, serve_tables

__all__ = [
    "KINDS",
    "PRESETS",
    "RESERVE",
    "Capacity",
    "Fit",
    "Grid",
    "Load",
    "Pair",
    "Preset",
    "Shape",
    "StepTimes",
    "Table",
    "Traffic",
    "bench_backends",
    "bench_device",
    "bench_generate",
    "bench_kernels",
    "bench_serve",
    "check_kinds",
    "check_loads",
    "check_picture",
    "draw_prompts",
    "draw_roofline",
    "fit",
    "fit_table",
    "generate_tables",
    "is_out_of_memory",
    "make_grid",
    "make_loads",
    "make_preset",
    "make_traffic",
    "serve_tables",
    "tables",
    "verify",
]
