"""Prompts that vLLM's own attention reads as plain tensors give what kvloom's backends give, and the same blocks."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from kvloom.integrations.vllm import block_layouts
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, PlanTensors, TensorSpec, Window, rotation_name
from tests.waits import no_waits

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: run `make test-vllm`")

from vllm.v1.attention.backends import fa_utils  # noqa: E402
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl  # noqa: E402

from kvloom.integrations.vllm._backend import KvloomImpl, _metadata, varlen_of  # noqa: E402

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 6, 2, 64
SCALE = DIM**-0.5
CAPACITY = 1000
K4 = TensorSpec(bits=4, grouping="per_channel", group_size=64)
V4 = TensorSpec(bits=4, grouping="per_token", group_size="head_dim")

# Tokens before a pass and in it, by sequence and in the order of the pass.
FIRST = {"a": (0, 40), "b": (0, 130), "c": (0, 70), "d": (0, 2)}
SECOND = {
    "e": (0, 70),
    "a": (40, 1),
    "b": (130, 90),
    "f": (0, 200),
    "g": (0, 33),
    "h": (0, 1),
    "c": (70, 5),
    "d": (2, 100),
}
# What one call reads: queries and states of each of its sequences.
EXACT = [
    [(40, 40), (130, 130), (70, 70), (2, 2)],
    [(70, 70)],
    [(90, 220)],
    [(200, 200), (33, 33)],
    [(100, 102)],
]


def plan_of(key=K4, value=V4, *, prefill="exact", sinks=0, heads=None, tensors=None):
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
    )
    entry = LayerPlan(layers=0, key=key, value=value, window=Window(sinks=sinks), heads=heads or {})
    return Plan(model=Fingerprint.of(config), layers=(entry,), prefill=prefill, tensors=tensors)


def turned(rotation):
    tensors = None
    if rotation == "calibrated":
        draw = torch.Generator().manual_seed(0)
        turns = {side: torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM, generator=draw)).Q for side in ("key", "value")}
        tensors = PlanTensors.of({rotation_name(0, side): turn.half() for side, turn in turns.items()})
    key, value = (side.model_copy(update={"rotation": rotation}) for side in (K4, V4))
    return plan_of(key, value, sinks=4, tensors=tensors)


PLANS = {
    "plain": plan_of(),
    "sinks": plan_of(sinks=4),
    "heads that differ": plan_of(sinks=4, heads={1: HeadPlan(value=TensorSpec(bits=8, grouping="per_token"))}),
    "hadamard": turned("hadamard"),
    "calibrated": turned("calibrated"),
}


class Served:
    """A layer, its blocks, and two passes over them."""

    def __init__(self, plan, varlen=None, *, dtype=torch.float32, device=CPU, **options):
        self.layout = block_layouts(plan, dtype)[0]
        matrices = {side: x.to(device) for side, x in plan.rotations().get(0, {}).items()}
        chosen = {"num_heads": HEADS, "scale": SCALE, "softcap": None, "sink_logits": None, **options}
        self.impl = KvloomImpl(self.layout, plan.prefill, matrices, varlen=varlen, **chosen)
        self.dtype, self.device = dtype, device
        self.width = 4 + self.layout.spare_blocks
        names = sorted({**FIRST, **SECOND})
        numbers = 1 + torch.randperm(len(names) * self.width, generator=torch.Generator().manual_seed(0))
        self.tables = dict(zip(names, numbers.view(len(names), -1).int(), strict=True))
        shape = (1 + numbers.numel(), 1, 1, self.layout.nbytes)
        self.storage = torch.zeros(shape, dtype=torch.uint8, device=device)

    def forward(self, sequences, seed):
        """What the layer gives for a pass over random states."""
        tokens = sum(new for _, new in sequences.values())
        draw = torch.Generator().manual_seed(seed)
        states = [torch.randn(tokens, n, DIM, generator=draw) for n in (HEADS, KV_HEADS, KV_HEADS)]
        query, key, value = (x.to(self.device, self.dtype) for x in states)
        output = torch.empty_like(query)
        metadata = self.metadata(sequences)
        with self.passing():
            self.impl.forward(None, query, key, value, self.storage, metadata, output)
        return output

    @contextmanager
    def passing(self):
        yield

    def metadata(self, sequences):
        lengths = torch.tensor([sum(both) for both in sequences.values()], dtype=torch.int32)
        starts = torch.tensor([0, *(new for _, new in sequences.values())]).cumsum(0)
        common = SimpleNamespace(
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(lengths.max()),
            num_reqs=len(sequences),
            query_start_loc_cpu=starts,
            seq_lens_cpu_upper_bound=lengths,
            seq_lens=lengths.to(self.device),
            block_table_tensor=torch.stack([self.tables[name] for name in sequences]).to(self.device),
        )
        spec = SimpleNamespace(num_kv_heads=KV_HEADS, sinks=self.layout.sinks, block_size=self.layout.page_tokens)
        return _metadata(common, spec, CAPACITY)


def slow(calls, q, k, v, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softcap=None, sink_logits=None):
    """Attention head by head and query by query; notes what it is asked for."""
    calls.append([])
    places = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (first, stop), (start, end) in places:
        calls[-1].append((stop - first, end - start))
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            for query in range(first, stop):
                reads = slice(start, end - (stop - 1 - query))
                scores = SCALE * k[reads, own] @ q[query, head]
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sink_logits is not None:
                    scores = torch.cat([scores, sink_logits[head : head + 1]])
                out[query, head] = torch.softmax(scores, 0)[: end - start - (stop - 1 - query)] @ v[reads, own]
    assert (max_seqlen_q, max_seqlen_k) == tuple(map(max, zip(*calls[-1], strict=True)))
    assert (cu_seqlens_q.dtype, cu_seqlens_k.dtype) == (torch.int32, torch.int32)
    assert (len(q), len(k), len(out)) == (cu_seqlens_q[-1], cu_seqlens_k[-1], len(q))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sink_logits": torch.linspace(-1, 2, HEADS)}], ids=str)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_prompts_read_the_same_by_one_function_of_several_sequences(plan, options):
    calls = []
    ours = Served(plan, **options)
    theirs = Served(plan, partial(slow, calls, **options), **options)
    for seed, sequences in enumerate((FIRST, SECOND)):
        wanted, got = (served.forward(sequences, seed) for served in (ours, theirs))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert theirs.storage.equal(ours.storage)
    assert calls == EXACT


def test_queries_that_read_pages_of_their_own_pass_are_left_to_the_backend():
    calls = []
    theirs = Served(plan_of(prefill="quantized"), partial(slow, calls))
    for seed, sequences in enumerate((FIRST, SECOND)):
        theirs.forward(sequences, seed)
    assert calls == []


def test_numbers_are_computed_once_a_pass(monkeypatch):
    """The second layer makes none: neither places in blocks nor where sequences start."""
    served = Served(PLANS["sinks"], partial(slow, []))
    served.forward(FIRST, 0)
    metadata = served.metadata(SECOND)
    states = [torch.randn(500, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    output = states.pop()
    served.impl.forward(None, *states, served.storage, metadata, output)
    made = []
    for name in ("arange", "tensor", "full", "full_like"):
        work = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, name=name, work=work, **more: made.append(name) or work(*a, **more))
    backend = SimpleNamespace(
        attend=lambda query, kv, **more: query.transpose(1, 2),
        attend_pooled=lambda query, kv, out, **more: query.transpose(1, 2),
        all_states=lambda kv, in_order: (torch.zeros(kv.shape),) * 2,
        append_pooled=lambda key, value, kv: None,
        encode=lambda key, value, layout, flags: torch.zeros(*key.shape[:2], 1, layout.nbytes, dtype=torch.uint8),
    )
    monkeypatch.setattr("kvloom.kernels.backend", lambda device: backend)
    served.impl.varlen = lambda **more: None
    served.impl.forward(None, *states, served.storage, metadata, output)
    assert made == []


def flash(**changes):
    """vLLM's own attention of a layer, without its device."""
    impl = object.__new__(FlashAttentionImpl)
    facts = {
        "scale": SCALE,
        "logits_soft_cap": 0,
        "vllm_flash_attn_version": 3,
        "batch_invariant_enabled": False,
        "fa4_hd256": False,
        "sinks": None,
    }
    for name, value in {**facts, **changes}.items():
        setattr(impl, name, value)
    return impl


def test_vllms_own_function_is_asked_as_vllm_asks_it(monkeypatch):
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", lambda **asked: asked, raising=False)
    logits = torch.zeros(HEADS)
    asked = varlen_of(flash(logits_soft_cap=2.0, sinks=logits, batch_invariant_enabled=True))(q=1)
    assert asked == {
        "q": 1,
        "softmax_scale": SCALE,
        "causal": True,
        "softcap": 2.0,
        "fa_version": 3,
        "num_splits": 1,
        "s_aux": logits,
    }
    assert varlen_of(flash())()["num_splits"] == 0


def test_layers_that_vllm_reads_by_other_means_are_left_to_the_backend():
    assert varlen_of(flash(vllm_flash_attn_version=None)) is None
    assert varlen_of(SimpleNamespace(vllm_flash_attn_version=3)) is None


class WithoutWaiting(Served):
    """Every pass goes twice from the same blocks: the second time nothing may wait for the device."""

    def forward(self, sequences, seed):
        held = self.storage.clone()
        super().forward(sequences, seed)
        self.storage.copy_(held)
        self.passing = no_waits
        out = super().forward(sequences, seed)
        del self.passing
        return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_flash_attention_gives_what_the_backend_gives(plan, softcap, dtype):
    impl = FlashAttentionImpl(HEADS, DIM, SCALE, KV_HEADS, None, None, "auto", logits_soft_cap=softcap)
    varlen = varlen_of(impl)
    assert varlen is not None
    calls = []

    def counted(**more):
        calls.append(len(more["cu_seqlens_q"]) - 1)
        return varlen(**more)

    options = {"softcap": softcap, "dtype": dtype, "device": torch.device("cuda", torch.cuda.current_device())}
    ours, theirs = Served(plan, **options), WithoutWaiting(plan, counted, **options)
    for seed, sequences in enumerate((FIRST, SECOND)):
        wanted, got = (served.forward(sequences, seed).float() for served in (ours, theirs))
        assert float((got - wanted).norm() / wanted.norm()) < (4e-3 if dtype == torch.float16 else 2e-2)
        assert theirs.storage[1:].equal(ours.storage[1:])
    assert calls == [4] * 2 + [1, 1, 2, 1] * 2
