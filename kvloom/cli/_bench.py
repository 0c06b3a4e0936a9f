"""`kvloom bench kernels`, `kvloom bench generate`, `kvloom bench serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvloom._dtypes import torch_dtype
from kvloom.cli._numbers import count_option, tokens_option
from kvloom.cli._terminal import (
    Device,
    Dtype,
    Model,
    OptionalModel,
    Plans,
    Results,
    Shape,
    Texts,
    config_of,
    load_or_make,
    named_plans,
    output_file,
    print_tables,
    progress,
)
from kvloom.errors import PlanError

app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")

_LOADS = {"cuda": "B1x8K,B8x8K,B1x64K", "cpu": "B1x512"}
_NEW_TOKENS = 64


@app.command()
def kernels(
    output: Results = Path("runs/kernels.jsonl"),
    shapes: Annotated[str | None, typer.Option(help="Batch and packed tokens: B8x32K,B1x4K.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Bits of keys and values: 8:8,4:2.")] = None,
    heads: Annotated[str, typer.Option(help="Query heads and KV heads.")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    key_group: Annotated[int, typer.Option(help="Tokens that share a scale of a key channel.")] = 64,
    window: Annotated[int, tokens_option("Exact tokens after the packed ones.", least=0)] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; on a CPU float32, elsewhere float16.")
    ] = None,
    backends: Annotated[str | None, typer.Option(help="cuda,triton,torch; all there are by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, ... or cpu; the first GPU by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline: roofline.png, .svg, .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON array.")] = False,
) -> None:
    """Time packed attention, packing and appending beside the best dense attention, and check errors."""
    from kvloom.bench import (
        bench_backends,
        bench_device,
        bench_kernels,
        check_picture,
        draw_roofline,
        make_grid,
        tables,
    )

    place = bench_device(device)
    grid = make_grid(
        place,
        shapes=shapes,
        pairs=pairs,
        heads=heads,
        head_dim=head_dim,
        key_group=key_group,
        window=window,
        dtype=dtype,
    )
    chosen = bench_backends(place, [name.strip() for name in backends.split(",")] if backends else None)
    if plot:
        check_picture(plot)
    output_file(output)
    with progress() as update:
        records = bench_kernels(grid, place, backends=chosen, out=output, progress=update)
    if plot:
        draw_roofline(records, plot)
    if as_json:
        typer.echo(json.dumps(records))
        return
    print_tables(tables(records))
    typer.echo("\n".join(f"wrote {path}" for path in (output, plot) if path))


@app.command()
def generate(
    model: OptionalModel = None,
    shape: Shape = None,
    preset: Annotated[str | None, typer.Option(help="kivi, kvmix or kvtuner: the setting they published.")] = None,
    plan: Plans = None,
    output: Results = Path("runs/generate.jsonl"),
    shapes: Annotated[
        str | None, typer.Option(help="Batch and prompt tokens: B1x8K,B*x32K; B* is the largest batch that fits.")
    ] = None,
    new: Annotated[int | None, tokens_option("Generated tokens; 64 by default.", least=2)] = None,
    fill: Annotated[
        Literal["prompt", "random"], typer.Option(help="Pass prompts through the model, or fill caches with numbers.")
    ] = "prompt",
    repeats: Annotated[int, count_option("Timed generations.")] = 3,
    caches: Annotated[
        str | None, typer.Option(help="dynamic,static,quantized,growing,fixed,loop; all of them by default.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON array.")] = False,
) -> None:
    """Time prompts and decoding, and find the largest batch, with plans' caches and transformers' own."""
    from kvloom.assets import shared_device, started_processes
    from kvloom.bench import (
        KINDS,
        bench_device,
        bench_generate,
        check_kinds,
        check_loads,
        generate_tables,
        make_loads,
        make_preset,
    )

    setting = make_preset(preset) if preset else None
    if setting and model is None:
        shape = shape or setting.shape
    if started_processes() > 1:
        shared_device(device)
    place = bench_device(device)
    loads = make_loads(shapes or (setting.loads if setting else _LOADS[place.type]))
    check_loads(loads, place)
    kinds = [kind.strip() for kind in caches.split(",")] if caches else KINDS
    check_kinds(kinds)
    weights = torch_dtype(dtype) if dtype else None
    plans = named_plans(plan, config_of(model, shape))
    output_file(output)
    loaded = load_or_make(model, shape, place, weights, sharded=True)
    usual = setting.new_tokens if setting else _NEW_TOKENS
    with progress() as update:
        records = bench_generate(
            loaded,
            plans,
            loads,
            new_tokens=usual if new is None else new,
            fill=fill,
            repeats=repeats,
            kinds=kinds,
            out=output,
            progress=update,
        )
    if as_json:
        typer.echo(json.dumps(records))
        return
    print_tables(generate_tables(records))
    if setting:
        typer.echo(f"setting: {setting.source}")
    typer.echo(f"wrote {output}")


@app.command()
def serve(
    model: Model,
    server: Annotated[
        list[str], typer.Option(help="NAME=http://localhost:8000, OpenAI-compatible; give it again to compare.")
    ],
    served_name: Annotated[
        str | None, typer.Option(help="What the servers call the model; the only one they have by default.")
    ] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests at a time: 1,8,32; 8 without --rate.")] = None,
    rate: Annotated[str | None, typer.Option(help="Requests a second, at random moments: 2,4.5.")] = None,
    requests: Annotated[int, count_option("Under each concurrency and rate.")] = 64,
    prompt: Annotated[int, tokens_option("Tokens of each prompt: 512, 4K.")] = 512,
    new: Annotated[int, tokens_option("Generated tokens of each.")] = 128,
    text: Texts = None,
    seed: Annotated[int, typer.Option(help="Of prompts and moments; a server may know the prompts of an old one.")] = 0,
    output: Results = Path("runs/serve.jsonl"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON array.")] = False,
) -> None:
    """Time running servers: requests and tokens a second, first tokens, and the times between tokens."""
    from kvloom.assets import EVALUATION, load_tokenizer, texts
    from kvloom.bench import bench_serve, draw_prompts, make_traffic, serve_tables

    traffic, servers = make_traffic(concurrency if concurrency or rate else "8", rate), _servers(server)
    output_file(output)
    content = "\n\n".join(source.content for source in texts(text or EVALUATION))
    tokens = load_tokenizer(model)(content, add_special_tokens=False, verbose=False).input_ids
    prompts = draw_prompts(tokens, len(traffic) * requests + 1, prompt, seed)
    with progress() as update:
        records = bench_serve(
            servers,
            prompts,
            traffic,
            new_tokens=new,
            model=served_name,
            seed=seed,
            out=output,
            progress=update,
        )
    if as_json:
        typer.echo(json.dumps(records))
        return
    print_tables(serve_tables(records))
    typer.echo(f"wrote {output}")


def _servers(listed: list[str]) -> dict[str, str]:
    """Addresses by name; an address without a name is its own.

    Raises:
        PlanError: two servers have one name.
    """
    found: dict[str, str] = {}
    for word in listed:
        name, _, address = word.rpartition("=")
        if (name or address) in found:
            raise PlanError(f"--server {word}: another server is named {name or address!r}; give each its own name.")
        found[name or address] = address
    return found
