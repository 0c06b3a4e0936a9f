"""Speed of the kernels: attention over pages, packing, appending, beside the best dense attention of the same run.

device = bench_device(None)
records = bench_kernels(make_grid(device, shapes="B8x32K", pairs="4:4,2:2"), device, out=Path("runs/kernels.jsonl"))
draw_roofline(records, Path("roofline.png"))
"""

from __future__ import annotations

from kvloom.bench._backends import bench_backends
from kvloom.bench._grid import Grid, Pair, Shape, make_grid
from kvloom.bench._roofline import check_picture, draw_roofline
from kvloom.bench._run import bench_device, bench_kernels
from kvloom.bench._table import Table, tables

__all__ = [
    "Grid",
    "Pair",
    "Shape",
    "Table",
    "bench_backends",
    "bench_device",
    "bench_kernels",
    "check_picture",
    "draw_roofline",
    "make_grid",
    "tables",
]
