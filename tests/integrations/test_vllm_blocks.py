"""Sequences in vLLM's blocks, without vLLM: what attention reads is what a `LoomCache` shows it, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from kvloom import kernels
from kvloom.cache import LoomCache
from kvloom.errors import CacheError, ModelError, PlanError
from kvloom.integrations.vllm import block_layouts, block_nbytes, spare_blocks
from kvloom.integrations.vllm._blocks import Blocks
from kvloom.integrations.vllm._decoding import Decoding
from kvloom.integrations.vllm._sequence import Sequence
from kvloom.integrations.vllm._watch import Watch
from kvloom.plan import Evict, Fingerprint, HeadPlan, LayerPlan, Plan, TensorSpec, Window
from tests.waits import no_waits

CPU = torch.device("cpu")
KV_HEADS = 2
K4 = TensorSpec(bits=4, grouping="per_channel", group_size=64)
V2 = TensorSpec(bits=2, grouping="per_token", group_size="head_dim")


def config_of(head_dim=16, layers=1, kv_heads=KV_HEADS):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=kv_heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    config._attn_implementation = "kvloom"
    return config


def plan_of(key=K4, value=V2, *, head_dim=16, window=None, heads=None, prefill="exact", evict=None):
    entry = LayerPlan(layers=0, key=key, value=value, window=window or Window(), heads=heads or {}, evict=evict)
    return Plan(model=Fingerprint.of(config_of(head_dim)), layers=(entry,), prefill=prefill)


@st.composite
def specs(draw, head_dim):
    bits = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    grouping = draw(st.sampled_from(["per_channel", "per_token"]))
    return TensorSpec(
        bits=bits,
        grouping=grouping,
        group_size=draw(st.sampled_from([16, 64, 128] if grouping == "per_channel" else ["head_dim", 16])),
        symmetric=draw(st.booleans()),
        outliers=draw(st.sampled_from([0.0, 0.0, 0.05])) if bits < 16 else 0.0,
    )


@st.composite
def plans(draw):
    head_dim = draw(st.sampled_from([16, 48]))
    key, value, other = (draw(specs(head_dim)) for _ in range(3))
    heads = {1: HeadPlan(key=other)} if draw(st.booleans()) else {}
    prefill = draw(st.sampled_from(["exact", "quantized"]))
    plan = plan_of(key, value, head_dim=head_dim, heads=heads, prefill=prefill)
    layout = block_layouts(plan, "float32")[0]
    most = min(layout.page_tokens, layout.nbytes // layout.token_nbytes)
    window = Window(sinks=draw(st.sampled_from(sorted({0, min(1, most), most // 2, most}))))
    return plan_of(key, value, head_dim=head_dim, heads=heads, prefill=prefill, window=window)


class Pool:
    """Blocks of all sequences, given out as vLLM does: for tokens and spare ones, in any order, never block 0."""

    def __init__(self, plan, blocks, seed=0, rank=0, world_size=1):
        self.plan = plan
        self.layout = block_layouts(plan, "float32", rank, world_size)[0]
        self.storage = torch.randint(256, (blocks, self.layout.nbytes), dtype=torch.uint8)
        self.blocks = Blocks(self.layout, self.storage, torch.float32, torch.zeros(2, dtype=torch.int32))
        self.free = (1 + torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(seed))).tolist()

    def tokens_of(self, key, value, computed, table):
        """Append tokens of a sequence whose blocks ``table`` names, and grows; what they attend to."""
        length = computed + key.shape[2]
        self.grow(table, length)
        sequence = sequence_of(torch.tensor(table, dtype=torch.int32), computed, length)
        return sequence.cache(self.blocks, sequence.append(self.blocks, key, value), self.plan.prefill)

    def decoded(self, key, value, computed, tables):
        """Append a token to every sequence ``[sequences, kv_heads, 1, head_dim]``; what each attends to."""
        for table, tokens in zip(tables, computed, strict=True):
            self.grow(table, tokens + 1)
        width = max(map(len, tables))
        table = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
        kv = decoding_of(self.layout, computed, table).append(self.blocks, key, value).gathered(with_new=True)
        return [kv.paged(slice(row, row + 1), *kv.levels()[row].tolist()) for row in range(len(tables))]

    def grow(self, table, tokens):
        while len(table) < -(-tokens // self.layout.page_tokens) + self.layout.spare_blocks:
            table.append(self.free.pop())


def sequence_of(table, computed, length):
    """That fills a pass."""
    return Sequence(slice(0, length - computed), computed, table)


def decoding_of(layout, computed, table, capacity=1000):
    """Of sequences that fill a pass, with ``computed`` tokens before it."""
    return Decoding(
        slice(0, len(computed)),
        torch.tensor([tokens + 1 for tokens in computed], dtype=torch.int32, device=table.device),
        table,
        most=max(computed) + 1,
        capacity=capacity,
        kv_heads=layout.kv_heads,
        sinks=layout.sinks,
        page_tokens=layout.page_tokens,
    )


def states(plan, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, plan.model.num_kv_heads, tokens, plan.model.head_dim)
    return tuple(torch.randn(shape, generator=generator) for _ in range(2))


def chunks_of(key, value, cuts):
    return zip(key.split(cuts, dim=2), value.split(cuts, dim=2), strict=True)


@st.composite
def cuts(draw, tokens):
    """Lengths that add up to ``tokens``."""
    places = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=8))) if tokens > 1 else []
    return [b - a for a, b in zip([0, *places], [*places, tokens], strict=True)]


def assert_same(ours, theirs):
    ours = ours.in_order()
    read = int(theirs.visible[-1])  # a page may be full with the last token that nobody reads packed yet
    assert (ours.length, ours.num_pages, ours.page_tokens) == (theirs.length, read, theirs.page_tokens)
    assert ours.visible.equal(theirs.visible)
    for part in ("sinks", "tail"):
        assert getattr(ours, part).key.equal(getattr(theirs, part).key), part
        assert getattr(ours, part).value.equal(getattr(theirs, part).value), part
    for mine, other in zip(ours.pages, theirs.pages, strict=True):
        assert (mine.heads, mine.layout) == (other.heads, other.layout)
        assert mine.data.equal(other.data[:, :, :read])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_pass_reads_what_a_cache_of_its_own_shows_it(data):
    plan = data.draw(plans())
    runs, pool = [], Pool(plan, 200)
    for seed in range(3):
        tokens = data.draw(st.integers(1, 300))
        chunks = list(chunks_of(*states(plan, tokens, seed), data.draw(cuts(tokens))))
        runs.append({"chunks": chunks, "cache": LoomCache(plan, config_of(plan.model.head_dim)), "table": []})
    while waiting := [run for run in runs if run["chunks"]]:
        run = data.draw(st.sampled_from(waiting))
        key, value = run["chunks"].pop(0)
        computed = run["cache"].get_seq_length()
        expected, _ = run["cache"].update(key, value, 0)
        assert_same(pool.tokens_of(key, value, computed, run["table"]), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_sequences_that_decode_together_read_what_caches_of_their_own_show_them(data):
    """From any lengths on, each step any of them; what is not theirs in the blocks stays."""
    plan = data.draw(plans())
    runs, pool = [], Pool(plan, 200)
    for seed in range(4):
        tokens = data.draw(st.integers(0, 200))
        key, value = states(plan, tokens + 70, seed)
        run = {"cache": LoomCache(plan, config_of(plan.model.head_dim)), "table": [], "states": (key, value)}
        if tokens:
            run["cache"].update(key[:, :, :tokens], value[:, :, :tokens], 0)
            pool.tokens_of(key[:, :, :tokens], value[:, :, :tokens], 0, run["table"])
        runs.append(run)
    for _ in range(70):
        some = data.draw(st.lists(st.sampled_from(runs), min_size=1, max_size=4, unique_by=id))
        computed = [run["cache"].get_seq_length() for run in some]
        now = [[x[:, :, n : n + 1] for x in run["states"]] for run, n in zip(some, computed, strict=True)]
        key, value = (torch.cat(x) for x in zip(*now, strict=True))
        others = sorted(set(range(1, 200)) - {block for run in some for block in run["table"]} - set(pool.free))
        before = pool.storage[others].clone()
        got = pool.decoded(key, value, computed, [run["table"] for run in some])
        for run, own, ours in zip(some, now, got, strict=True):
            assert_same(ours, run["cache"].update(*own, 0)[0])
        assert pool.storage[others].equal(before)


def test_a_decoding_pass_packs_what_is_full_and_copies_no_page(monkeypatch):
    """The pages handed over are the blocks themselves."""
    plan = plan_of(window=Window(sinks=4))
    pool, (key, value) = Pool(plan, 60), states(plan, 200)
    lengths, tables = [67, 131, 90, 2], [[] for _ in range(4)]
    for tokens, table in zip(lengths, tables, strict=True):
        pool.tokens_of(key[:, :, :tokens], value[:, :, :tokens], 0, table)
    packed = []
    backend = type(kernels.backend(CPU))
    encode = backend.encode
    monkeypatch.setattr(backend, "encode", lambda self, k, *rest: packed.append(k.shape) or encode(self, k, *rest))
    for table, tokens in zip(tables, lengths, strict=True):
        pool.grow(table, tokens + 1)
    width = max(map(len, tables))
    table = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
    new = key[:, :, :1].expand(4, -1, -1, -1)
    kv = decoding_of(pool.layout, lengths, table).append(pool.blocks, new, new).gathered(with_new=True)
    assert packed == [(1, KV_HEADS, 64, 16)] * 2
    assert kv.levels().tolist() == [[68, 0], [132, 1], [91, 1], [3, 0]]
    assert kv.table.data_ptr() == table[:, 1:].data_ptr()
    held = pool.storage.untyped_storage().data_ptr()
    assert [group.data.untyped_storage().data_ptr() for group in kv.pages] == [held]
    sequence = sequence_of(torch.tensor(tables[1], dtype=torch.int32), 132, 134)
    tail = sequence.append(pool.blocks, key[:, :, :2], value[:, :, :2])
    several = sequence.cache(pool.blocks, tail, plan.prefill)
    assert [group.data.untyped_storage().data_ptr() for group in several.pages] == [held]


@pytest.mark.parametrize("sinks", [0, 4])
def test_rows_that_only_fill_up_a_batch_change_nothing(sinks):
    """Their tables name the null block, or, in vLLM's other runner, no block."""
    plan = plan_of(window=Window(sinks=sinks))
    pool, (key, value) = Pool(plan, 40), states(plan, 200)
    tables = [[], []]
    for tokens, table in zip((67, 63 + sinks), tables, strict=True):
        pool.tokens_of(key[:, :, :tokens], value[:, :, :tokens], 0, table)
        pool.grow(table, tokens + 1)
    width, fillers = max(map(len, tables)), [0, -1]
    table = torch.tensor([*(t + [0] * (width - len(t)) for t in tables), *([n] * width for n in fillers)]).int()
    held = pool.storage.clone()
    two, four = ([x[:, :, :count].transpose(0, 2) for x in (key, value)] for count in (2, 4))
    alone = decoding_of(pool.layout, [67, 63 + sinks], table[:2]).append(pool.blocks, *two)
    wanted = pool.storage.clone()
    pool.storage.copy_(held)
    kv = decoding_of(pool.layout, [67, 63 + sinks, -1, -1], table).append(pool.blocks, *four)
    assert pool.storage[1:].equal(wanted[1:])
    assert kv.before[:2].equal(alone.before)
    assert not wanted[1:].equal(held[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_graph_decodes_what_steps_do(sinks):
    """Captured over null blocks, replayed with other lengths and tables, the last row a filler; pages fill."""
    plan = plan_of(head_dim=64, window=Window(sinks=sinks))
    layout, device, rows = block_layouts(plan, "float16")[0], torch.device("cuda"), 4
    backend, width = kernels.backend(device), 5 + layout.spare_blocks
    own = 1 + torch.randperm(3 * width, generator=torch.Generator().manual_seed(0)).view(3, -1).int().to(device)
    prompts = [1, 60 + sinks, 130]
    pools = []
    for _ in range(2):
        storage = torch.full((1 + 3 * width, layout.nbytes), 255, dtype=torch.uint8, device=device)  # NaN
        pools.append(Blocks(layout, storage, torch.float16, torch.zeros(2, dtype=torch.int32, device=device)))
        for row, tokens in enumerate(prompts):
            key, value = (x.half().to(device) for x in states(plan, tokens, row))
            sequence_of(own[row], 0, tokens).append(pools[-1], key, value)
    lengths = torch.ones(rows, dtype=torch.int32, device=device)
    table = torch.zeros(rows, width, dtype=torch.int32, device=device)
    key, value, query = (torch.zeros(rows, heads, 1, 64, dtype=torch.float16, device=device) for heads in (2, 2, 8))

    def step(blocks, count, graph):
        most = 300 if graph else int(lengths.max())
        options = {"most": most, "capacity": 300, "kv_heads": 2, "sinks": sinks, "page_tokens": layout.page_tokens}
        decoding = Decoding(slice(0, count), lengths[:count], table[:count], **options)
        kv = decoding.append(blocks, key[:count], value[:count])
        return backend.attend_pooled(query[:count], kv, scaling=0.125)

    step(pools[0], rows, graph=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(pools[0], rows, graph=True)
    table[:3] = own
    for count in range(8):
        lengths.copy_(torch.tensor([tokens + count + 1 for tokens in prompts] + [0]))
        for x in (key, value, query):
            x.normal_()
        graph.replay()
        expected = step(pools[1], 3, graph=False)
        assert float((out[:3] - expected).float().norm() / expected.float().norm()) < 2e-3
    assert pools[0].storage[1:].equal(pools[1].storage[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [0, 4])
def test_on_a_gpu_nothing_waits_and_blocks_and_outputs_are_those_of_the_cpu(sinks):
    """Heads of two layouts that take turns; pages fill in some of the steps."""
    heads = {1: HeadPlan(value=TensorSpec(bits=8, grouping="per_token"))}
    plan = plan_of(head_dim=64, heads=heads, window=Window(sinks=sinks))
    layout, lengths = block_layouts(plan, "float16")[0], [1, 2, 62, 66, 130, 190]
    width = 5 + layout.spare_blocks
    table = 1 + torch.randperm(6 * width, generator=torch.Generator().manual_seed(0)).view(6, -1).int()
    sides = {}
    for device in (CPU, torch.device("cuda")):
        storage = torch.full((1 + 6 * width, layout.nbytes), 255, dtype=torch.uint8, device=device)  # NaN
        sides[device] = Blocks(layout, storage, torch.float16, torch.zeros(2, dtype=torch.int32, device=device))
        for row, tokens in enumerate(lengths):
            key, value = (x.half().to(device) for x in states(plan, tokens, row))
            sequence = sequence_of(table[row].to(device), 0, tokens)
            with no_waits() if device.type == "cuda" and row else nullcontext():
                sequence.cache(sides[device], sequence.append(sides[device], key, value), plan.prefill)
    for step in range(6):
        key, value = (x.transpose(0, 2).half() for x in states(plan, 6, 100 + step))
        query = torch.randn(6, 8, 1, 64, generator=torch.Generator().manual_seed(step)).half()
        computed, outputs = [n + step for n in lengths], []
        for device, blocks in sides.items():
            own = [x.to(device) for x in (key, value, query, table)]
            decoding = decoding_of(layout, computed, own[3])
            with no_waits() if device.type == "cuda" and step else nullcontext():
                kv = decoding.append(blocks, own[0], own[1])
                outputs.append(kernels.backend(device).attend_pooled(own[2], kv, scaling=0.125))
        wanted, got = (x.float().cpu() for x in outputs)
        assert float((got - wanted).norm() / wanted.norm()) < 4e-3
    wanted, got = (blocks.storage[1:].cpu() for blocks in sides.values())
    assert got.equal(wanted)


def test_what_is_out_of_range_is_raised_when_it_has_arrived():
    seen = Watch(CPU)
    seen.check()
    seen.flags[0] = 1
    seen.check()
    with pytest.raises(CacheError, match="NaN, infinity"):
        seen.check()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_shared_prefix_goes_on_at_the_last_page_that_ends_within_it(data):
    plan = data.draw(plans().filter(lambda plan: plan.prefill == "quantized"))
    pool = Pool(plan, 100)
    size = pool.layout.page_tokens
    blocks, more = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 100))
    tokens = blocks * size + more
    key, value = states(plan, tokens)
    table: list[int] = []
    pool.tokens_of(key, value, 0, table)
    sinks = pool.layout.sinks
    start = (blocks * size - sinks) // size * size + sinks
    shared = table[: -(-start // size)]
    if start % size:  # vLLM copies a block that is shared in part
        copied = pool.free.pop()
        pool.storage[copied] = pool.storage[shared[-1]]
        shared = [*shared[:-1], copied]
    before = pool.storage[table].clone()
    cache = LoomCache(plan, config_of(plan.model.head_dim))
    cache.update(key[:, :, :start], value[:, :, :start], 0)
    expected, _ = cache.update(key[:, :, start:], value[:, :, start:], 0)
    assert_same(pool.tokens_of(key[:, :, start:], value[:, :, start:], start, shared), expected)
    assert pool.storage[table].equal(before)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(plans())
def test_spare_blocks_suffice_and_none_is_too_many(plan):
    layout = block_layouts(plan, "float32")[0]
    last_bytes = []
    for tokens in range(1, 4 * layout.page_tokens):
        sinks = min(tokens, layout.sinks)
        pages = max(0, tokens - sinks - 1) // layout.page_tokens  # the newest token is exact before its page is packed
        exact = tokens - sinks - pages * layout.page_tokens
        needed = (sinks > 0) + pages + 1 + -(-exact // (layout.nbytes // layout.token_nbytes))
        last_bytes.append(needed - -(-tokens // layout.page_tokens))
    assert layout.spare_blocks == max(*last_bytes, 0)
    assert spare_blocks({0: layout}) == layout.spare_blocks


def test_a_block_has_the_bytes_of_one_page_of_every_head():
    plan = plan_of(heads={1: HeadPlan(value=TensorSpec(bits=8, grouping="per_token"))}, head_dim=64)
    of_keys = 64 * 64 // 2 + 2 * 2 * 64
    of_values = [64 * 64 // 4 + 2 * 2 * 64, 64 * 64 + 2 * 2 * 64]
    assert block_nbytes(plan) == 2 * of_keys + sum(of_values)


def by_head(window=None):
    """Four KV heads; the first two take more bytes than the others."""
    heads = {0: HeadPlan(value=TensorSpec(bits=16, grouping="per_token")), 3: HeadPlan(key=V2)}
    model = Fingerprint.of(config_of(kv_heads=4))
    return Plan(model=model, layers=(LayerPlan(layers=0, key=K4, value=V2, window=window or Window(), heads=heads),))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_have_their_own_pages_and_the_bytes_of_the_fullest(world_size):
    plan = by_head()
    whole = block_layouts(plan, "float32")[0].layouts
    ranks = [block_layouts(plan, "float32", rank, world_size)[0] for rank in range(world_size)]
    copies = max(1, world_size // 4)  # ranks that hold the same head
    assert [layout for rank in ranks[::copies] for layout in rank.layouts] == list(whole)
    assert all(rank == ranks[i - i % copies] for i, rank in enumerate(ranks))
    fullest = max(sum(layout.nbytes for layout in rank.layouts) for rank in ranks)
    assert {rank.nbytes for rank in ranks} == {block_nbytes(plan, "float32", world_size)} == {fullest}
    assert len({rank.spare_blocks for rank in ranks}) == 1


@pytest.mark.parametrize("sinks", [0, 4, 20])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_what_a_cache_of_its_part_shows_it(rank, sinks):
    """Also where its blocks have more bytes than its pages, and so room for more exact tokens."""
    plan = by_head(Window(sinks=sinks))
    part, pool = plan.shard(rank, 2), Pool(plan, 20, rank=rank, world_size=2)
    assert (pool.layout.nbytes > sum(layout.nbytes for layout in pool.layout.layouts)) == (rank == 1)
    cache, table, computed = LoomCache(part, config_of()), [], 0
    for key, value in chunks_of(*states(part, 280), [1, 70, 5, 134, *[1] * 70]):
        expected, _ = cache.update(key, value, 0)
        if computed < 210:
            got = pool.tokens_of(key, value, computed, table)
        else:
            (got,) = pool.decoded(key, value, [computed], [table])
        assert_same(got, expected)
        computed += key.shape[2]


def test_exact_layers_need_one_spare_block():
    exact = TensorSpec(bits=16, grouping="per_token")
    assert spare_blocks(block_layouts(plan_of(exact, exact), "float32")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": Window(recent=32)}, r"^layers 0: window.recent or recent_ratio is set, .*: leave it out\.$"),
        ({"window": Window(recent_ratio=0.1)}, r"^layers 0: window.recent or recent_ratio is set"),
        (
            {"window": Window(sinks=65)},
            r"^layer 0: 65 window.sinks take 16640 exact bytes, .* for 8: ask for fewer",
        ),
        ({"evict": Evict(policy="snapkv", budget=64)}, r"^layers 0: evict is set, .*: leave it out\.$"),
        ({"key": TensorSpec(bits=4, grouping="per_channel", pre_rope=True)}, r"^layers 0: key.pre_rope is set, "),
        (
            {"key": TensorSpec(bits=2, grouping="per_channel", codec="nuq", symmetric=False)},
            r"^layers 0: key.codebook is missing",
        ),
    ],
)
def test_plans_that_blocks_cannot_hold_are_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        block_layouts(plan_of(**changes), "float32")


@pytest.mark.parametrize(
    ("other", "window", "message"),
    [
        (
            TensorSpec(bits=4, grouping="per_channel", group_size=128),
            Window(),
            r"^group_size makes pages of \[64, 128\]",
        ),
        (K4, Window(sinks=4), r"^window.sinks differ between layers \(\[0, 4\]\)"),
    ],
)
def test_layers_that_no_block_fits_together_are_refused(other, window, message):
    plan = Plan(
        model=Fingerprint.of(config_of(layers=2)),
        layers=(
            LayerPlan(layers=0, key=K4, value=V2),
            LayerPlan(layers=1, key=other, value=V2, window=window),
        ),
    )
    with pytest.raises(PlanError, match=message):
        block_layouts(plan, "float32")


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 3, "^the 4 KV heads of .* cannot be split evenly over 3 processes"),
        (0, 6, "^the 4 KV heads of .* cannot be split evenly over 6 processes"),
        (0, 0, "^there is no rank 0 of 0"),
        (8, 8, "^there is no rank 4 of 4"),
    ],
)
def test_heads_that_cannot_be_split_are_refused(rank, world_size, message):
    with pytest.raises(ModelError, match=message):
        block_layouts(by_head(), "float32", rank, world_size)
