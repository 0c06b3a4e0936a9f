"""One run over a grid: ceilings first, then shape by shape the dense baselines and every backend beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kvloom.bench._backends import bench_backends
from kvloom.bench._ceilings import Ceilings, measure_ceilings
from kvloom.bench._dense import best_dense, dense_record
from kvloom.bench._grid import Grid, Pair, Shape
from kvloom.bench._machine import surroundings
from kvloom.bench._packed import Cell, append_record, attend_record, encode_record
from kvloom.bench._peers import peers
from kvloom.bench._timing import clock
from kvloom.errors import KernelError
from kvloom.evaluate import Progress, Record, silent, write_records
from kvloom.kernels import Backend


def bench_device(name: str | None) -> torch.device:
    """The device to measure: the first GPU by default.

    Raises:
        KernelError: It is not there, or of a kind that is not measured.
    """
    try:
        device = torch.device(name or "cuda")
    except RuntimeError:
        raise KernelError(f"--device {name!r} is no device: give cuda, cuda:1, ... or cpu.") from None
    if device.type not in ("cuda", "cpu"):
        raise KernelError(f"--device {name!r} is not measured: give cuda, cuda:1, ... or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KernelError(f"there is no GPU {device} here: --device cpu measures the CPU backends on smaller shapes.")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@torch.no_grad()
def bench_kernels(
    grid: Grid,
    device: torch.device,
    *,
    backends: Mapping[str, Backend | str] | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Measure attention, packing and appending, and the dense attention beside them.

    Args:
        grid: Shapes, pairs, heads and dtype.
        device: Where; `bench_device` finds it.
        backends: As `bench_backends` finds them; all that `device` has by default.
        out: Results file; every record is written as soon as it is made, and replaces the same device's record of the
            same case.
        progress: Told before every piece of work.

    Returns:
        Records of the kinds ``kernel_ceilings``, ``kernel_backend`` (one that is not available), ``kernel_dense``,
        ``kernel_attend``, ``kernel_encode``, ``kernel_append``, in the order in which they were made.

    Raises:
        KernelError: No backend works on ``device``.
        DataError: ``out`` is not a results file.
    """
    records = []
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for record in _Run(grid, device, backends or bench_backends(device), progress).records():
            records.append(record)
            if out:
                write_records(out, [record])
    return records


class _Run:
    def __init__(
        self, grid: Grid, device: torch.device, found: Mapping[str, Backend | str], progress: Progress
    ) -> None:
        self._lacks = {name: backend for name, backend in found.items() if isinstance(backend, str)}
        self._backends = {name: backend for name, backend in found.items() if isinstance(backend, Backend)}
        self._grid, self._device, self._clock = grid, device, clock(device)
        self._peers, self._progress = peers(device), progress
        self._where = surroundings(device, grid.dtype_name)
        cells = len(grid.pairs) * len(self._backends)
        self._done = 0
        self._total = 1 + len(grid.shapes) * (len(self._peers) + 2 * cells) + len(self._batches()) * cells

    def records(self) -> Iterator[Record]:
        """Every record, as it is made."""
        self._tell("bandwidth")
        ceilings = measure_ceilings(self._device, self._grid.dtype, self._clock)
        rates = {"read_bytes_per_s": ceilings.read, "copy_bytes_per_s": ceilings.copy, "flops_per_s": ceilings.flops}
        yield self._record("kernel_ceilings", [], rates)
        for name, lack in self._lacks.items():
            yield self._record("kernel_backend", [name], {"backend": name, "skipped": lack})
        for shape in self._grid.shapes:
            yield from self._shape(shape, ceilings)
        for batch in self._batches():
            for pair, name, cell in self._cells(Shape(batch, self._grid.shapes[0].tokens)):
                self._tell(f"append B{batch} {pair.label} {name}")
                fields = {"backend": name, **self._case(pair), "batch": batch}
                made = append_record(cell, self._clock)
                yield self._record("kernel_append", [name, f"B{batch}", pair.label], fields | made)
        self._progress("measured", self._total, self._total)

    def _shape(self, shape: Shape, ceilings: Ceilings) -> Iterator[Record]:
        at = {"batch": shape.batch, "tokens": shape.tokens}
        baselines = []
        for peer in self._peers:
            self._tell(f"{shape.label} {peer.name}")
            made = dense_record(peer, self._grid, shape, self._device, self._clock, ceilings)
            baselines.append(made)
            yield self._record("kernel_dense", [peer.name, shape.label], self._heads() | at | made)
        dense = best_dense(baselines)
        for pair, name, cell in self._cells(shape):
            key = [name, shape.label, pair.label]
            fields = {"backend": name, **self._case(pair), **at}
            self._tell(f"attend {shape.label} {pair.label} {name}")
            window = {"window": self._grid.window}
            made = attend_record(cell, self._clock, ceilings, dense)
            yield self._record("kernel_attend", [*key, f"w{self._grid.window}"], fields | window | made)
            self._tell(f"encode {shape.label} {pair.label} {name}")
            yield self._record("kernel_encode", key, fields | encode_record(cell, self._clock, ceilings))

    def _cells(self, shape: Shape) -> Iterator[tuple[Pair, str, Cell]]:
        for pair in self._grid.pairs:
            for name, backend in self._backends.items():
                yield pair, name, Cell(backend, self._grid, shape, pair, self._device)

    def _batches(self) -> list[int]:
        return list(dict.fromkeys(shape.batch for shape in self._grid.shapes))

    def _heads(self) -> Record:
        grid = self._grid
        return {"query_heads": grid.query_heads, "kv_heads": grid.kv_heads, "head_dim": grid.head_dim}

    def _case(self, pair: Pair) -> Record:
        layout = self._grid.layout(pair)
        return {
            **self._heads(),
            "key_bits": pair.key_bits,
            "value_bits": pair.value_bits,
            "key_group": self._grid.key_group,
            "page_tokens": layout.page_tokens,
            "page_nbytes": layout.nbytes,
        }

    def _record(self, kind: str, key: list[str], fields: dict[str, Any]) -> Record:
        grid = self._grid
        heads = f"{grid.query_heads}/{grid.kv_heads}x{grid.head_dim}"
        case = [self._where["device"], grid.dtype_name, heads, f"ch{grid.key_group}", *key]
        return {"kind": kind, "id": " ".join(case), **fields, **self._where}

    def _tell(self, what: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the private pools of graphs that are gone
        self._progress(what, self._done, self._total)
        self._done += 1
