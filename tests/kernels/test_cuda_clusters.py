"""When the splits of a row tile are one cluster: only if the device runs all clusters at the same time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvloom.kernels import _cuda_launch
from kvloom.pages import Format, page_layout

KERNEL = _cuda_launch.Kernel(page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 64), 64), 4, True)
GROUPS = (16, 16, 18, 18, 18, 18, 18, 10)
"""Multiprocessors of a device's groups, 132 together: a cluster lies within one of them."""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    def active_clusters(name: str, cluster: int, threads: int, shared: int) -> int:
        assert (name, threads) == ("attend", 128)
        return sum(group // cluster for group in GROUPS)

    monkeypatch.setattr(_cuda_launch._nvrtc, "module", lambda *_: SimpleNamespace(active_clusters=active_clusters))
    monkeypatch.setattr(_cuda_launch.torch.cuda, "get_device_capability", lambda _: (9, 0))
    _cuda_launch.merges_in_cluster.cache_clear()
    yield
    _cuda_launch.merges_in_cluster.cache_clear()


@pytest.mark.parametrize(
    ("splits", "tiles", "merges"),
    [(1, 132, True), (2, 64, True), (4, 30, True), (4, 32, False), (8, 15, True), (8, 16, False), (17, 1, False)],
)
def test_a_cluster_that_would_wait_is_not_made(hopper, splits: int, tiles: int, merges: bool):
    assert _cuda_launch.merges_in_cluster(KERNEL, splits, tiles, 0) == merges


def test_older_devices_have_no_clusters(hopper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_cuda_launch.torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert not _cuda_launch.merges_in_cluster(KERNEL, 1, 1, 0)
