"""Triton's attention, interpreted, over pages that are kept: evenly, and of another number for every head."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
from drawn import config_of, new_cache
from evicting import SCALING, evicting, feed, stream

from kvloom.kernels._torch import TORCH
from kvloom.kernels._triton import TritonBackend
from kvloom.plan import Fingerprint, Plan, TensorSpec, Window

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="triton's interpreter is off",
)


@pytest.mark.parametrize(("policy", "padding"), [("snapkv", ()), ("adakv", ()), ("adakv", (0, 20))])
def test_kept_pages_are_read_as_the_reference_reads_them(policy, padding):
    spec = TensorSpec(bits=4, grouping="per_channel")
    plan = Plan.from_specs(Fingerprint.of(config_of(64)), {0: (spec, spec)}, window=Window(sinks=4))
    plan = evicting(plan, policy, 150)
    tokens, cache = stream(plan, 302, batch=2, padding=padding), new_cache(plan)
    tokens.key[:, 0, 100:110] = tokens.query[:, :2] = 5.0  # the queries of one KV head look at ten tokens
    feed(cache, tokens, [300])
    assert {len(set(kept.counts.flatten().tolist())) for kept in cache.packed_layers[0].kept} == {
        1 + (policy == "adakv")
    }
    for queries in (1, 2):
        now = slice(300, 300 + queries)
        handle, _ = copy.deepcopy(cache).update(tokens.key[:, :, now], tokens.value[:, :, now], 0)
        mask = tokens.mask(300, 300 + queries)
        ours, theirs = (
            kernel.attend(tokens.query[:, :, now], handle, scaling=SCALING, mask=mask)
            for kernel in (TritonBackend(), TORCH)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
