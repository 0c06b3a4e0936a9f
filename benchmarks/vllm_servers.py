r"""vLLM's own caches and kvloom's, each served by itself on the same device and asked the same over HTTP.

    python -m benchmarks.vllm_servers             # one GPU: Llama 3.1 8B's shape; bf16, vLLM's fp8, K4V2
    python -m benchmarks.vllm_servers --model FOLDER --caches auto,K4V2 --loads 2x200+16 --requests 4 --serve \
        "--dtype float32 --enforce-eager --max-model-len 4096 --kv-cache-memory-bytes 200000000"

The second says whether it runs, on a CPU. Weights are random, of a shape or of a folder's config. `auto` is the compute
dtype's cache, `fp8` vLLM's own; other words are plans: `K4V2`, of so many bits in every layer (`Plan.uniform`), or a
preset. Prompts are random tokens, no two alike, and prefixes are not shared. A load `32x8192+256` is 32 requests at a
time, of so many prompt and new tokens. Servers run one after the other and are ended when they have answered. What a
load has shown is written at once, and in the tables even if a later one is broken off.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from kvloom.assets import shape_config
from kvloom.bench.serving import Traffic, against_first, bench_serve, serve_tables
from kvloom.cli._terminal import print_tables
from kvloom.evaluate import Record, write_records
from kvloom.plan import Plan, preset

OWN_CACHES = ("auto", "fp8")
ENTRY = ("-m", "vllm.entrypoints.openai.api_server")
STARTS_WITHIN_S = 900
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's servers


def make_folder(config: Any, folder: Path) -> Path:
    """A model's folder without weights; its tokenizer knows every id as a word."""
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1").save_pretrained(folder)
    return folder


def read_loads(text: str) -> list[tuple[int, ...]]:
    """Requests at a time, prompt tokens and new tokens of each load, ``32x8192+256,...``."""
    found = [re.fullmatch(r"(\d+)x(\d+)\+(\d+)", load) for load in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"cannot read {text!r}; give loads like 1x8192+256,32x8192+256")
    return [tuple(map(int, it.groups())) for it in found if it]


def plan_of(word: str, config: Any) -> Plan:
    """``K4V2``: so many bits everywhere; else a preset."""
    uniform = re.fullmatch(r"K(\d+)V(\d+)", word)
    return Plan.uniform(config, int(uniform[1]), int(uniform[2])) if uniform else preset(word, config)


def cache_arguments(cache: str, config: Any, folder: Path) -> list[str]:
    """What a server is to be told about its cache."""
    if cache in OWN_CACHES:
        return ["--kv-cache-dtype", cache]
    plan = folder.with_name(f"{cache.replace('/', '-')}.json")
    plan_of(cache, config).save(plan)
    return ["--hf-overrides", f'{{"quantization_config": {{"quant_method": "kvloom", "plan": "{plan}"}}}}']


@contextmanager
def server(name: str, arguments: list[str], log: Path) -> Iterator[str]:
    """The address of a server that answers; ended on leaving."""
    port = free_port()
    command = [sys.executable, *ENTRY, "--port", str(port), *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield _answering(name, f"http://127.0.0.1:{port}", process, log)
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # its engine is a process of the same group
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def _answering(name: str, url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    start = time.monotonic()
    while time.monotonic() < start + STARTS_WITHIN_S:
        if process.poll() is not None:
            break
        with suppress(OSError), _DIRECT.open(f"{url}/health", timeout=2):
            print(f"{name}: answers after {time.monotonic() - start:.0f} s; {_cache_size(log)}", flush=True)
            return url
        time.sleep(0.5)
    raise SystemExit(f"{name} does not start: {log} says why; its end:\n{log.read_text()[-1500:]}")


def _cache_size(log: Path) -> str:
    found = re.findall(r"KV cache size: [\d,]+ tokens", log.read_text())
    return str(found[-1]) if found else "the size of its cache is not in its log"


def ask(name: str, url: str, asked: Namespace, vocabulary: int) -> Iterator[Record]:
    """Records of one server, load by load, with prompts that the other servers get, too."""
    for n, (concurrency, prompt, new) in enumerate(asked.loads):
        draw = random.Random(n)
        prompts = [
            [draw.randrange(2, vocabulary) for _ in range(prompt)] for _ in range((asked.requests or concurrency) + 1)
        ]
        yield from bench_serve({name: url}, prompts, [Traffic(concurrency=concurrency)], new_tokens=new)


def main() -> None:
    """Serve, ask, and print tables."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--model", help="a folder whose config is to be taken in place of a shape")
    parser.add_argument("--caches", default="auto,fp8,K4V2")
    parser.add_argument("--loads", type=read_loads, default="1x8192+256,32x8192+256,96x8192+256")
    parser.add_argument("--requests", type=int, help="of each load; as many as come at a time by default")
    parser.add_argument("--serve", default="--max-model-len 16384", help="for all servers")
    parser.add_argument("--logs", type=Path, default=Path("runs/vllm"), help="and records")
    asked = parser.parse_args()
    records: list[Record] = []
    try:
        for record in measured(asked):
            records.append(record)
            write_records(asked.logs / "records.jsonl", [record])
    finally:
        if records:
            print_tables(serve_tables(against_first(records)))


def measured(asked: Namespace) -> Iterator[Record]:
    """Records of all servers, which are started and ended meanwhile."""
    config = AutoConfig.from_pretrained(asked.model) if asked.model else shape_config(asked.shape)
    asked.logs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as place:
        folder = make_folder(config, Path(place) / "model")
        common = ["--model", str(folder), "--served-model-name", asked.model or asked.shape, "--load-format", "dummy"]
        common += ["--no-enable-prefix-caching", *shlex.split(asked.serve)]
        arguments = {cache: cache_arguments(cache, config, folder) for cache in asked.caches.split(",")}
        for cache, own in arguments.items():
            with server(cache, [*common, *own], asked.logs / f"{cache.replace('/', '-')}.log") as url:
                yield from ask(cache, url, asked, config.vocab_size)


if __name__ == "__main__":
    main()
