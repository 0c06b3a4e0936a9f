"""One run of generation: ceilings first, then load by load every cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvloom._processes import leads, world_size
from kvloom.bench._ceilings import Ceilings, measure_ceilings
from kvloom.bench._grid import Shape
from kvloom.bench._machine import surroundings
from kvloom.bench._peers import first_line
from kvloom.bench._timing import clock
from kvloom.bench.generation._fit import cache_nbytes, step_nbytes
from kvloom.bench.generation._lineup import KINDS, Lineup
from kvloom.bench.generation._loads import Load, check_loads
from kvloom.bench.generation._measure import Fill, Job, measure, room, survives
from kvloom.bench.generation._memory import attempt, largest, release
from kvloom.errors import CacheError, DataError, KernelError
from kvloom.evaluate import (
    Contestant,
    Progress,
    Record,
    check_model,
    conditions,
    fingerprint,
    model_name,
    open_pieces,
    pieces_path,
    silent,
    write_results,
)
from kvloom.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OUT_OF_MEMORY = "out of memory"
# What a batch that fits eagerly is lowered by, as a share of it, if compiling asks for more.
_BACK_OFF = 16


def bench_generate(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    loads: Sequence[Load],
    *,
    new_tokens: int = 64,
    fill: Fill = "prompt",
    repeats: int = 3,
    kinds: Sequence[str] = KINDS,
    name: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Measure `generate`: the prompt's time, decode tokens a second, memory, and the largest batch.

    Every cache is warmed up and, where `generate` does so, compiled before it is timed. A cache that runs out of memory
    is recorded as such. A killed run goes on where it stopped: finished records lie beside ``out`` until the run ends.
    Processes that share a model all measure, and the first one writes; ``world_size`` says how many they are.

    Args:
        model: A causal language model in evaluation mode, on the device to measure.
        plans: Plans by name.
        loads: Prompt lengths and batches.
        new_tokens: See `Job`.
        fill: See `Job`.
        repeats: See `Job`.
        kinds: Which caches, of `KINDS`.
        name: Of the model in the records; by default the last part of its path.
        out: Results file; records of the same cases are replaced.
        progress: Told before every piece of work.

    Returns:
        Records of the kinds ``generate_ceilings``, ``generate_note`` (caches that do not work here) and ``generate``;
        ``skipped`` of the latter says why there are no figures. ``times_best_peer`` compares `tokens_per_s` with the
        fastest of transformers' own caches under the same load.

    Raises:
        DataError: There are too few new tokens or repeats, no load or no cache, the largest batch is asked for on a
            CPU or of a sharded model, or ``out`` is not a results file.
        ModelError: A plan is for another model, or the model is in training mode.
        PlanError: A kind of cache is unknown, or a plan lacks a codebook or its tensors.
        MissingExtraError: A codec of a plan needs a package that is not installed.
    """
    check_model(model)
    if new_tokens < 2 or repeats < 1:
        raise DataError(
            f"{new_tokens} new tokens, {repeats} repeats: give at least 2 new tokens, of which all but the first are "
            "decoded, and 1 repeat."
        )
    check_loads(loads, model.device)
    if world_size(model) > 1 and any(load.batch is None for load in loads):
        raise DataError(
            "the largest batch (B*) is found by running out of memory, which processes that share a model do not do at "
            "one time: give a number."
        )
    lineup = Lineup(model, plans, kinds)
    if not loads or not lineup(1):
        raise DataError("there is nothing to measure: give a load, and a plan or one of transformers' caches.")
    job = Job(model, new_tokens, fill, repeats)
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
        run = _Run(job, lineup, loads, name or model_name(model), out, progress)
        records = against_peers(list(run.records()))
    write_results(out, records, model)
    if out and leads(model):
        pieces_path(out).unlink(missing_ok=True)
    return records


def against_peers(records: list[Record]) -> list[Record]:
    """Records with ``best_peer``, the fastest cache of the same load that has no plan, and their rate over its rate."""
    best: dict[str, Record] = {}
    for record in records:
        if record["kind"] == "generate" and not record["skipped"] and not record["plan"]:
            load = record["load"]
            best[load] = max(best.get(load, record), record, key=lambda it: float(it["tokens_per_s"]))
    return [_against(record, best.get(record.get("load", ""))) for record in records]


def _against(record: Record, best: Record | None) -> Record:
    if record["kind"] != "generate" or record["skipped"]:
        return record
    ratio = record["tokens_per_s"] / best["tokens_per_s"] if best else None
    return {**record, "best_peer": best and best["name"], "times_best_peer": ratio}


class _Run:
    def __init__(
        self, job: Job, lineup: Lineup, loads: Sequence[Load], name: str, out: Path | None, progress: Progress
    ) -> None:
        self._job, self._lineup, self._loads, self._progress = job, lineup, loads, progress
        self._device = job.model.device
        self._settings = {"new_tokens": job.new_tokens, "fill": job.fill, "repeats": job.repeats}
        self._ledger = open_pieces(out, job.model)
        self._conditions = conditions(job.model)
        dtype = str(job.model.dtype).removeprefix("torch.")
        self._where = {"model": name, "world_size": world_size(job.model), **surroundings(self._device, dtype)}
        self._done, self._total = 0, 1 + len(loads) * len(lineup(1))

    def records(self) -> Iterator[Record]:
        """Every record, made now or before the run was killed."""
        self._tell("bandwidth")
        made = self._piece("generate_ceilings", [], self._ceilings)
        self._where["run"] = made["run"]
        ceilings = Ceilings(made["read_bytes_per_s"], made["copy_bytes_per_s"], made["flops_per_s"])
        yield made
        for note in self._lineup.notes:
            yield self._piece("generate_note", [note], partial(dict, skipped=note))
        for load in self._loads:
            for contestant in self._lineup(room(load.tokens, self._job.new_tokens)):
                self._tell(f"{load.label} {contestant.name}")
                case = [contestant.identity, load.label, self._settings]
                yield self._piece("generate", case, partial(self._cell, load, contestant, ceilings))
        self._progress("measured", self._total, self._total)

    def _ceilings(self) -> Record:
        measured = measure_ceilings(self._device, self._job.model.dtype, clock(self._device))
        release(self._device)
        return {
            "read_bytes_per_s": measured.read,
            "copy_bytes_per_s": measured.copy,
            "flops_per_s": measured.flops,
        }

    def _cell(self, load: Load, contestant: Contestant, ceilings: Ceilings) -> Record:
        record: Record = {
            "name": contestant.name,
            "cache": contestant.method,
            "prefill": contestant.prefill,
            **self._settings,
            "plan": contestant.plan is not None,
            "load": load.label,
            "prompt": load.tokens,
            "batch": load.batch,
        }
        try:
            return record | self._measured(load, contestant, ceilings)
        except (CacheError, KernelError, DataError) as error:
            return record | {"skipped": first_line(error)}
        except Exception as error:  # what other people's caches raise for a load they do not take
            if contestant.plan is not None:
                raise
            return record | {"skipped": first_line(error)}

    def _measured(self, load: Load, contestant: Contestant, ceilings: Ceilings) -> Record:
        batch = load.batch or self._largest(load, contestant)
        while batch:
            shape = Shape(batch, load.tokens)
            made = attempt(partial(measure, self._job, contestant, shape, ceilings), self._device)
            if made is not None:
                return {"skipped": None, **made}
            batch = 0 if load.batch else batch - max(1, batch // _BACK_OFF)
        return {"skipped": _OUT_OF_MEMORY}

    def _largest(self, load: Load, contestant: Contestant) -> int:
        """The largest batch that survives; memory that runs out is given back every time."""

        def fits(batch: int) -> bool:
            shape = Shape(batch, load.tokens)
            return bool(attempt(partial(survives, self._job, contestant, shape), self._device))

        return largest(fits, self._guess(load, contestant))

    def _guess(self, load: Load, contestant: Contestant) -> int:
        """Sequences that fit by arithmetic, if the GPU is all ours; packages' caches are taken for uncompressed."""
        config, dtype = self._job.model.config, self._job.model.dtype
        tokens, free = room(load.tokens, self._job.new_tokens), torch.cuda.mem_get_info(self._device)[0]
        cache = sum(cache_nbytes(contestant.plan, config, 1, tokens, dtype))
        return max(1, free // (cache + step_nbytes(config, tokens, dtype)))

    def _tell(self, what: str) -> None:
        self._progress(what, self._done, self._total)
        self._done += 1

    def _piece(self, kind: str, case: Sequence[object], make: Callable[[], Record]) -> Record:
        """A record, from before the run was killed if it was made then."""
        key = fingerprint([kind, self._conditions, case])
        if key not in self._ledger:
            identity = [self._where[name] for name in ("model", "world_size", "device", "dtype")]
            fields = make()
            self._ledger.add(kind, key, {"id": fingerprint([*identity, case]), **fields, **self._where})
        return {field: value for field, value in self._ledger[key].items() if field != "key"}
