"""A real small model and real texts that work offline once fetched, and any others you name."""

from kvloom._userdir import cache_dir
from kvloom.assets._fetch import MODEL_NAME, essays_dir, fetch, model_dir
from kvloom.assets._gsm8k import gsm8k_rows
from kvloom.assets._longbench import longbench_rows
from kvloom.assets._model import load_config, load_model, load_tokenizer
from kvloom.assets._rows import Row, Rows, json_file
from kvloom.assets._shapes import SHAPES, random_model, shape_config
from kvloom.assets._sharding import shared_device, started_processes
from kvloom.assets._texts import CALIBRATION, ESSAYS, EVALUATION, Text, digest, texts
from kvloom.assets._windows import token_windows

__all__ = [
    "CALIBRATION",
    "ESSAYS",
    "EVALUATION",
    "MODEL_NAME",
    "SHAPES",
    "Row",
    "Rows",
    "Text",
    "cache_dir",
    "digest",
    "essays_dir",
    "fetch",
    "gsm8k_rows",
    "json_file",
    "load_config",
    "load_model",
    "load_tokenizer",
    "longbench_rows",
    "model_dir",
    "random_model",
    "shape_config",
    "shared_device",
    "started_processes",
    "texts",
    "token_windows",
]
