"""Peers against float64; those that need a GPU through stand-ins with their documented layouts."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvloom.bench import Shape
from kvloom.bench import _peers as under_test
from kvloom.bench._caches import random_dense, random_query
from kvloom.bench._error import exact_attention, relative_error
from kvloom.bench._peers import FlashAttention3, FlashInfer, Peer, peers

CPU = torch.device("cpu")
SHAPE = Shape(2, 192)


def error_of(peer: Peer, grid) -> float:
    query = random_query(grid, SHAPE, CPU)
    key, value = random_dense(grid, SHAPE, SHAPE.tokens, CPU)
    out = peer.prepare(query, key, value, grid.scaling)()
    return relative_error(
        out.view(2, grid.query_heads, grid.head_dim), exact_attention(query, key, value, grid.scaling)
    )


def test_torch_both_ways(grid):
    both = peers(CPU)
    assert [peer.name for peer in both] == ["sdpa", "sdpa-grouped"]
    assert max(error_of(peer, grid) for peer in both) < 1e-5
    assert [peer.lack(torch.float32) for peer in both] == [None, None]


def test_what_a_gpu_is_compared_with():
    names = [peer.name for peer in peers(torch.device("cuda"))]
    torchs = ["sdpa-flash", "sdpa-flash-grouped", "sdpa-cudnn", "sdpa-cudnn-grouped"]
    assert names == [*torchs, "fa3", "flashinfer", "flashinfer-tensor-cores"]


def test_absent_peers_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(under_test.importlib.util, "find_spec", lambda name: None)
    assert FlashAttention3().lack(torch.float16) == "takes bfloat16 only"
    assert FlashAttention3().lack(torch.bfloat16) == "not installed"
    assert FlashInfer(tensor_cores=True).lack(torch.float16) == "not installed"


def test_a_broken_install_is_not_fatal(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "flashinfer.py").write_text("raise OSError('libcudart.so.12: cannot open\\nshared object')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert FlashInfer(tensor_cores=True).lack(torch.float16) == "does not import: libcudart.so.12: cannot open"


@pytest.mark.parametrize(("name", "with_lse"), [("flash_attn_interface", False), ("fa3_fwd_interface", True)])
def test_fa3_is_given_tokens_before_heads(grid, monkeypatch: pytest.MonkeyPatch, name: str, with_lse: bool):
    def flash_attn_with_kvcache(q, k_cache, v_cache, softmax_scale=None):
        assert q.shape == (2, 1, 4, 64)
        assert k_cache.shape == v_cache.shape == (2, 192, 2, 64)
        q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        out = scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
        return (out, None) if with_lse else out

    module = ModuleType(name)
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    assert error_of(FlashAttention3(), grid) < 1e-5


class Wrapper:
    """FlashInfer's documented interface, in torch."""

    made = 0

    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert workspace.dtype == torch.uint8
        assert (kv_layout, use_tensor_cores) == ("HND", True)
        Wrapper.made += 1

    def plan(self, indptr, indices, last_page_len, *heads, sm_scale, q_data_type, kv_data_type):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert indptr.tolist() == [0, 3, 6]
        assert last_page_len.tolist() == [64, 64]
        assert heads == (4, 2, 64, 64)
        self.indices, self.scale = indices, sm_scale

    def run(self, query, pages):
        key, value = (
            x[self.indices.long()].unflatten(0, (2, 3)).transpose(1, 2).flatten(2, 3)  # [batch, heads, tokens, dim]
            for x in pages
        )
        return scaled_dot_product_attention(query[:, :, None], key, value, scale=self.scale, enable_gqa=True)[:, :, 0]


def test_flashinfer_is_given_pages_and_planned_once_a_shape(grid, monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(FlashInfer, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(Wrapper, "made", 0)
    peer = FlashInfer(tensor_cores=True)
    assert error_of(peer, grid) < 1e-5
    assert error_of(peer, grid) < 1e-5
    assert Wrapper.made == 1
