"""Caches of fixed size on CUDA: the reference's bytes, float64's attention, whole steps as graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvloom
from kvloom import kernels
from kvloom.bench.generation._fill import fill_random
from kvloom.errors import CacheError
from kvloom.kernels._torch import TORCH
from kvloom.pages import ExactKV, Format, HeadPages, StaticKV, page_layout, page_tokens_of
from kvloom.plan import Evict, Fingerprint, LayerPlan, Window, full_pages, preset

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
KV_HEADS = 3
HEADS = ((0, 2), (1,))
NUQ = (-1.0, -0.25, 0.25, 1.0)

LAYOUTS = [
    (128, Format(4, "per_channel", 64), Format(4, "per_token", 128)),
    (80, Format(3, "per_channel", 32), Format(2, "per_token", 16)),
    (64, Format(2, "per_token", 32), Format(5, "per_channel", 64)),
    (128, Format(8, "per_channel", 128, True), Format(16, "per_token", 128)),
    (256, Format(1, "per_channel", 64), Format(6, "per_token", 64, True)),
    (128, Format(3, "per_channel", 64, rotation="hadamard"), Format(4, "per_token", 128, rotation="hadamard")),
    (80, Format(2, "per_channel", 64), Format(2, "per_token", 80, codec="nuq", codebook=NUQ, rotation="hadamard")),
]


def make(dim, key, value, window, capacity, batch, dtype, *, scattered) -> StaticKV:
    """An empty cache; the middle head has 2-bit values of its own."""
    tokens = page_tokens_of(key, value)
    layouts = [page_layout(key, v, dim, 2, tokens) for v in (value, Format(2, "per_token", 16))]
    filled = [full_pages(window, n, tokens) for n in range(capacity + 1)]
    pages = filled[-1]
    lead = (1, pages * batch) if scattered else (batch, pages)
    groups = tuple(
        HeadPages(heads, layout, torch.full((lead[0], len(heads), lead[1], layout.nbytes), 255, device=DEVICE).byte())
        for heads, layout in zip(HEADS, layouts, strict=True)
    )
    ring = -(-(window.recent + tokens) // tokens) * tokens
    exact = [
        ExactKV(*(torch.full((batch, KV_HEADS, n, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)))
        for n in (window.sinks, ring)
    ]
    state = torch.zeros(2 * batch + 1 + 4 * batch * KV_HEADS, dtype=torch.int32, device=DEVICE)
    flags = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    table = torch.randperm(pages * batch, device=DEVICE).view(batch, pages).int() if scattered else None
    return StaticKV(groups, *exact, state, flags, torch.tensor(filled, device=DEVICE).int(), tokens, table)


def reference(query, kv, mask, scaling) -> torch.Tensor:
    """In fp32, sequence by sequence; in the cache's dtype while no page is full."""
    outputs = []
    for b, (tokens, pages) in enumerate(kv.levels().tolist()):
        rows = slice(b, b + 1)
        own = query[rows].float() if pages else query[rows]
        seen = None if mask is None else mask[rows, ..., :tokens]
        outputs.append(TORCH.attend(own, kv.paged(rows, tokens, pages), scaling=scaling, mask=seen).float())
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(("dim", "key", "value"), LAYOUTS)
def test_steps_are_the_references(dim, key, value, scattered, dtype) -> None:
    torch.manual_seed(dim)
    window, capacity, batch = Window(sinks=5, recent=20), 300, 2
    ours = make(dim, key, value, window, capacity, batch, dtype, scattered=scattered)
    theirs = make(dim, key, value, window, capacity, batch, dtype, scattered=False)
    cuda = kernels.backend(DEVICE)
    assert cuda.is_graph_safe([g.layout for g in ours.pages], dtype)
    ahead = torch.randn(2, batch, KV_HEADS, 1, dim, device=DEVICE, dtype=dtype)
    for kv in (ours, theirs):  # lengths 1 and 0 from here on differ
        TORCH.append(ahead[0], ahead[1], kv)
        kv.levels()[1] = 0
    for step in range(capacity - 1):
        k, v = torch.randn(2, batch, 1, KV_HEADS, dim, device=DEVICE, dtype=dtype).transpose(2, 3)
        cuda.append(k, v, ours)
        TORCH.append(k, v, theirs)
        if step % 7 and step < capacity - 3:
            continue
        query = torch.randn(batch, KV_HEADS * 4, 1, dim, device=DEVICE, dtype=dtype)
        mask = torch.rand(batch, 1, 1, capacity, device=DEVICE) < 0.8
        mask[..., 0] = True
        for given in (None, mask):
            output = cuda.attend_static(query, ours, scaling=dim**-0.5, mask=given)
            expected = reference(query, theirs, given, dim**-0.5)
            error = float((output.float() - expected).norm() / expected.norm())
            assert error < (2e-3 if dtype == torch.float16 else 1.2e-2), step
    assert ours.levels().tolist() == theirs.levels().tolist()
    for g, h in zip(ours.pages, theirs.pages, strict=True):
        for b in range(batch):
            held = int(ours.filled[ours.levels()[b, 0]])
            rows = slice(b, b + 1)
            assert ours.records(g, rows, held).equal(theirs.records(h, rows, held))
    assert not ours.flags.any()
    assert not ours.counters().any()
    for _ in range(2):
        cuda.append(k, v, ours)
    assert ours.levels()[:, 0].tolist() == [capacity, capacity]
    assert ours.flags.tolist() == [0, 1]


def test_what_cannot_be_packed_sets_a_flag() -> None:
    kv = make(
        64, Format(4, "per_channel", 64), Format(2, "per_token", 64), Window(), 128, 1, torch.float16, scattered=False
    )
    state = torch.ones(1, KV_HEADS, 1, 64, device=DEVICE, dtype=torch.float16)
    for step in range(64):
        kernels.backend(DEVICE).append(state, state * (torch.inf if step == 9 else 1.0), kv)
        assert kv.flags.tolist() == [int(step == 63), 0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=128,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def uniform(model) -> kvloom.Plan:
    return kvloom.Plan.uniform(model, 4, 4, window=Window(sinks=4, recent=10))


def turned(model) -> kvloom.Plan:
    return preset("kvloom/K4V4", model)


def mixed(model) -> kvloom.Plan:
    """Turned heads beside others, clipped grids beside a codebook."""
    key = {"bits": 4, "grouping": "per_channel", "group_size": 64, "codec": "clipped"}
    value = {"bits": 4, "grouping": "per_token", "group_size": "head_dim", "codec": "lloyd", "symmetric": True}
    heads = {1: {"key": key | {"rotation": "hadamard"}, "value": value | {"rotation": "hadamard"}}}
    entry = LayerPlan.model_validate({"layers": "0-1", "key": key, "value": value, "heads": heads})
    return kvloom.Plan(model=Fingerprint.of(model), layers=(entry,))


def kept(model, policy: str = "snapkv") -> kvloom.Plan:
    """Fewer than half of a prompt's tokens."""
    plan = uniform(model)
    evict = Evict(policy=policy, budget=90, parameters={"window": 8})
    return plan.model_copy(update={"layers": tuple(x.model_copy(update={"evict": evict}) for x in plan.layers)})


def unevenly_kept(model) -> kvloom.Plan:
    return kept(model, "adakv")


@pytest.mark.parametrize("make_plan", [kept, unevenly_kept])
def test_steps_over_kept_pages_are_the_references(model, make_plan) -> None:
    torch.manual_seed(2)
    kvloom.enable(model)
    cache = kvloom.LoomCache(make_plan(model), model, max_tokens=600)
    fill_random(cache, model, 2, 400)
    ours = cache.packed_layers[0].store
    theirs, cuda = copy.deepcopy(ours), kernels.backend(DEVICE)
    for step in range(200):
        k, v = torch.randn(2, 2, 1, 2, 64, device=DEVICE, dtype=torch.bfloat16).transpose(2, 3)
        cuda.append(k, v, ours)
        TORCH.append(k, v, theirs)
        if step % 9 and step < 197:
            continue
        query = torch.randn(2, 8, 1, 64, device=DEVICE, dtype=torch.bfloat16)
        mask = torch.rand(2, 1, 1, 600, device=DEVICE) < 0.8
        mask[..., 400 + step] = True
        for given in (None, mask):
            output = cuda.attend_static(query, ours, scaling=0.125, mask=given)
            expected = TORCH.attend_static(query.float(), theirs, scaling=0.125, mask=given)
            assert float((output.float() - expected).norm() / expected.norm()) < 1.2e-2, step
    assert ours.levels().equal(theirs.levels())
    for g, h in zip(ours.pages, theirs.pages, strict=True):
        assert g.data.equal(h.data)
    assert not ours.flags.any()
    assert not ours.counters().any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make_plan", [uniform, turned, mixed, kept, unevenly_kept])
def test_generate_replays_graphs_and_gives_the_growing_caches_logits(model, make_plan, padded) -> None:
    torch.manual_seed(1)
    kvloom.enable(model)
    plan = make_plan(model)
    ids = torch.randint(3, 128, (2, 100), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :30] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 100,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    options |= {"return_dict_in_generate": True, "output_logits": True}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    growing = model.generate(ids, past_key_values=kvloom.LoomCache(plan, model), **options)
    forced = growing.sequences
    for _ in range(2):
        cache = kvloom.LoomCache(plan, model, max_tokens=256)
        assert cache.is_compileable
        static = model.generate(ids, past_key_values=cache, **options)
        equal = (static.sequences == forced).all(0).long().cumprod(0)
        same = int(equal.sum()) - ids.shape[1]
        assert same > 0  # afterwards a tie was broken otherwise
        for ours, theirs in zip(static.logits[:same], growing.logits[:same], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < (3e-2 if make_plan is uniform else 6e-2)
        cache.check()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_a_full_cache_stops_generate(model) -> None:
    kvloom.enable(model)
    cache = kvloom.LoomCache(kvloom.Plan.uniform(model, 4, 4), model, max_tokens=120)
    ids = torch.randint(3, 128, (1, 100), device="cuda")
    with pytest.raises(CacheError, match="room for 120 tokens"):
        model.generate(
            ids, past_key_values=cache, max_new_tokens=50, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert int(cache.get_seq_length()) == 120
