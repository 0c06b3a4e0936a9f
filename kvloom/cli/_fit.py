"""`kvloom fit`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kvloom._dtypes import torch_dtype
from kvloom.cli._numbers import tokens_option
from kvloom.cli._terminal import (
    OptionalModel,
    Plans,
    Shape,
    config_of,
    err,
    load_or_make,
    named_plans,
    print_tables,
    progress,
)
from kvloom.errors import KernelError


def fit(
    model: OptionalModel = None,
    shape: Shape = None,
    gpu: Annotated[str | None, typer.Option(help="Its memory: 80GiB, '24 GB'; that of the first GPU here.")] = None,
    tokens: Annotated[int, tokens_option("Of each sequence, prompt and generated: 32K, ...")] = 32768,
    plan: Plans = None,
    reserve: Annotated[str, typer.Option(help="For the CUDA context, kernels' workspace and gaps.")] = "1GiB",
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; the checkpoint's own by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how many sequences fit uncompressed and under plans; on a GPU, allocate them to make sure."""
    import torch

    import kvloom.bench
    from kvloom.allocate import parse_bytes

    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    if not (gpu or here):
        raise KernelError("there is no GPU here: say how much memory to fill, as in --gpu 80GiB.")
    memory, config = parse_bytes(gpu) if gpu else here, config_of(model, shape)
    plans, kind = named_plans(plan, config), torch_dtype(dtype) if dtype else config.dtype
    capacity = kvloom.bench.fit(
        config,
        plans,
        memory=memory,
        tokens=tokens,
        dtype=kind or torch.bfloat16,
        reserve=parse_bytes(reserve),
    )
    if memory <= here:
        loaded = load_or_make(model, shape, torch.device("cuda", 0), capacity.dtype)
        with progress() as update:
            capacity = kvloom.bench.verify(capacity, loaded, plans, update)
    else:
        err.print("predicted only: there is no GPU of that size here to allocate on")
    if as_json:
        typer.echo(json.dumps({**asdict(capacity), "dtype": str(capacity.dtype).removeprefix("torch.")}))
    else:
        print_tables([kvloom.bench.fit_table(capacity)])
