"""What a run was measured on."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from uuid import uuid4

import torch

from kvloom._version import __version__
from kvloom.evaluate import Record


def surroundings(device: torch.device, dtype_name: str) -> Record:
    """Fields of every record of a run: its name, the device, its driver, versions, the compute dtype and the time."""
    on_gpu = device.type == "cuda"
    return {
        "run": uuid4().hex[:20],
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "driver": _driver() if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "kvloom": __version__,
        "dtype": dtype_name,
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where `nvidia-smi` is not there to tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.split("\n")[0].strip() or None
