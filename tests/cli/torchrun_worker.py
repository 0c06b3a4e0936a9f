"""One of several processes that run command lines, one after the other; the argument is a JSON file of them."""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path

import torch

from kvloom.cli import main


@atexit.register
def tell() -> None:
    """Registered before what the command line does at the end, so it comes last."""
    print("parted:", not torch.distributed.is_initialized(), file=sys.stderr)


def run(words: list[str]) -> int:
    """The exit code of `kvloom` with these words."""
    sys.argv = ["kvloom", *words]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    codes = [run(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    print("codes", codes)
