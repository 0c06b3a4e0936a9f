from __future__ import annotations

import pytest
import torch

from kvloom import kernels
from kvloom.bench import Grid, Pair, Shape
from kvloom.bench import _ceilings as ceilings
from kvloom.bench import _timing as timing

CPU = torch.device("cpu")


@pytest.fixture
def grid() -> Grid:
    """Small enough for a test."""
    return Grid(
        shapes=(Shape(2, 256),),
        pairs=(Pair(4, 2),),
        query_heads=4,
        kv_heads=2,
        head_dim=64,
        key_group=64,
        window=8,
        dtype=torch.float32,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurements, over fewer samples and bytes, of one backend."""
    monkeypatch.setattr(kernels, "backends", lambda device: {"good": kernels.backend(device)}, raising=False)
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setattr(timing, "CPU_MAX_COPIES", 2)
    monkeypatch.setitem(ceilings._READ_BYTES, "cpu", 1 << 20)
