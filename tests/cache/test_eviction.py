"""Eviction on random keys and values: what stays, what attention reads of it, and how many bytes it takes."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from drawn import EXAMPLES, FEWER, KV_HEADS, assert_same, config_of, contents, cuts, new_cache, plans
from evicting import POLICIES, QUERY_HEADS, SCALING, evicting, evicting_plans, feed, kept_slots, stream
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cache_invariants import page_size, rounded

from kvloom.cache import LoomCache, loom_attention
from kvloom.errors import CacheError, PlanError
from kvloom.eviction import _room
from kvloom.pages import places, stored
from kvloom.plan import Fingerprint, Plan, TensorSpec, Window

EIGHT = TensorSpec(bits=8, grouping="per_channel")
EXACT = TensorSpec(bits=16, grouping="per_token")


def plan_of(spec=EIGHT):
    return Plan.from_specs(Fingerprint.of(config_of(16)), {0: (spec, spec)}, window=Window(sinks=4))


# -- nothing to evict -------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data())
def test_a_budget_that_is_never_reached_changes_nothing(data):
    plan, policy = data.draw(plans(prefill="exact")), data.draw(st.sampled_from(sorted(POLICIES)))
    kept = evicting(plan, policy, 1500)
    plan = plan.model_copy(update={"layers": tuple(x.model_copy(update={"evict": None}) for x in kept.layers)})
    batch, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 300))
    padding = [data.draw(st.integers(0, 30)) for _ in range(batch)] if not plan.layers[0].window.sinks else []
    parts, chunks = stream(plan, tokens, batch=batch, padding=padding), data.draw(cuts(tokens))
    ours, theirs = new_cache(kept), new_cache(plan)
    for a, b in zip(feed(ours, parts, chunks), feed(theirs, parts, chunks), strict=True):
        assert a.equal(b)
    mine, its = contents(ours), contents(theirs)
    for n, group in enumerate(theirs.packed_layers[0].pages):
        assert mine[f"pages.{n}"].view_as(group.data).equal(its[f"pages.{n}"])
    for name in ("sinks.key", "sinks.value", "tail.key", "tail.value"):
        assert mine[name].equal(its[name])


# -- what attention reads ---------------------------------------------------------------------------------------------


def as_kept(plan, tokens, layer, row, head):
    """Keys and values of a KV head in float64, from the slots it keeps: its pages rounded."""
    slots = layer._slots()[row, head]
    size, first = page_size(plan), layer.sinks.tokens
    stop = first + layer.num_pages * size
    sides = []
    for n, (side, x) in enumerate((("key", tokens.key), ("value", tokens.value))):
        own = x[row, head, slots.clamp_min(0)].double()
        matrix = plan.rotations().get(0, {}).get(side)
        spec = plan.layers[0].head(head)[n]
        packed = own[first:stop].unflatten(0, (-1, size))[None]
        own[first:stop] = rounded(packed.float(), spec, matrix[head].double() if matrix is not None else None)[
            0
        ].flatten(0, 1)
        sides.append(own[slots >= 0])
    return *sides, slots[slots >= 0]


def slow_attention(plan, tokens, layer, query, at):
    """One query at slot ``at`` over what the layer keeps and the tokens after it, padding left out."""
    batch, heads, dim = query.shape
    out = torch.zeros(batch, heads, dim, dtype=torch.float64)
    for row in range(batch):
        for q in range(heads):
            head = q // (heads // KV_HEADS)
            key, value, slots = as_kept(plan, tokens, layer, row, head)
            now = slice(layer.length, at + 1)
            key = torch.cat([key, tokens.key[row, head, now].double()])
            value = torch.cat([value, tokens.value[row, head, now].double()])
            slots = torch.cat([slots, torch.arange(layer.length, at + 1)])
            scores = key @ query[row, q].double() * SCALING
            scores = scores.masked_fill(slots < tokens.padding[row], -torch.inf)
            out[row, q] = torch.softmax(scores, 0) @ value
    return out


@EXAMPLES
@given(st.data())
def test_attention_reads_exactly_what_is_kept(data):
    plan = data.draw(evicting_plans())
    batch, prompt = data.draw(st.integers(1, 2)), data.draw(st.integers(40, 500))
    padding = [data.draw(st.integers(0, 39)) for _ in range(batch)] if data.draw(st.booleans()) else []
    decoded, second = data.draw(st.integers(0, 80)), data.draw(st.integers(1, 90))
    tokens = stream(plan, prompt + decoded + second + 1, batch=batch, padding=padding)
    cache = new_cache(plan)
    feed(cache, tokens, [prompt, *[1] * decoded])
    for count, start in ((second, prompt + decoded), (1, prompt + decoded + second)):
        before = copy.deepcopy(cache.packed_layers[0])
        output = feed(cache, tokens, [count], start)[0]
        for i in {0, count - 1}:
            expected = slow_attention(plan, tokens, before, tokens.query[:, :, start + i], start + i)
            torch.testing.assert_close(output[:, i].double(), expected, atol=3e-4, rtol=1e-4)


# -- what stays -------------------------------------------------------------------------------------------------------


def slow_choice(policy, tokens, row, head, length, limit, sinks, newest):
    """Slots that stay of one prompt: sinks, then the newest, then by score; the scores by a loop."""
    key, group = tokens.key[row, head].double(), QUERY_HEADS // KV_HEADS
    pad = int(tokens.padding[row])
    received = torch.zeros(length, length, dtype=torch.float64)
    for q in range(head * group, (head + 1) * group):
        logits = tokens.query[row, q].double() @ key.T * SCALING
        hidden = torch.ones(length, length).tril().eq(0) | (torch.arange(length) < pad)
        received += torch.softmax(logits.masked_fill(hidden, -torch.inf), -1).nan_to_num() / group
    window = POLICIES[policy].get("window", length)
    before = torch.nn.functional.pad(received[-window:, : length - window].sum(0), (0, window))
    scores = {
        "h2o": received.sum(0),
        "snapkv": torch.nn.functional.max_pool1d(before[None], 3, 1, 1)[0],
        "key_norm": -key.norm(dim=-1),
        "streaming_llm": torch.arange(length, dtype=torch.float64),
    }[policy]
    stays = list(range(pad, length))[:sinks]
    stays += [slot for slot in range(length - newest, length) if slot not in stays]
    rest = sorted(set(range(length)) - set(stays), key=lambda slot: (slot >= pad, float(scores[slot]), -slot))
    return sorted(stays + rest[len(rest) - (limit - len(stays)) :])


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "snapkv", "key_norm"])
@pytest.mark.parametrize("padding", [(), (0, 37)])
def test_the_tokens_of_the_largest_scores_stay(policy, padding):
    plan = evicting(plan_of(), policy, 150)
    tokens = stream(plan, 320, batch=2, padding=padding)
    cache = new_cache(plan)
    feed(cache, tokens, [320])
    room = plan.room(0)
    for row in range(2):
        for head in range(KV_HEADS):
            expected = slow_choice(policy, tokens, row, head, 320, 150, 4, room.newest(150))
            ours = kept_slots(cache, row, head)
            assert sorted(ours) == expected
            assert ours[:4] == expected[:4] == [tokens.padding[row] + i for i in range(4)]
            assert ours[4:] == sorted(ours[4:])


def test_heads_of_a_layer_keep_different_numbers():
    plan = evicting(plan_of(), "adakv", 150)
    tokens = stream(plan, 500, batch=2)
    tokens.key[:, 0, 100:110] = tokens.query[:, :2] = 5.0  # the queries of one KV head look at ten tokens
    cache = new_cache(plan)
    feed(cache, tokens, [500])
    layer = cache.packed_layers[0]
    kept = torch.tensor([[len(kept_slots(cache, row, head)) for head in range(KV_HEADS)] for row in range(2)])
    assert kept.sum(1).tolist() == [300, 300]
    assert kept.tolist() == [[86, 214], [86, 214]]
    assert layer.nbytes() == plan.nbytes(2, 500, "float32")


def test_left_padded_sequences_keep_what_they_keep_alone():
    for policy in sorted(POLICIES):
        plan = evicting(plan_of(), policy, 150)
        tokens = stream(plan, 300, batch=2, padding=(0, 60))
        cache, alone = new_cache(plan), new_cache(plan)
        feed(cache, tokens, [300])
        tokens.key, tokens.value, tokens.query = (x[1:, :, 60:] for x in (tokens.key, tokens.value, tokens.query))
        tokens.padding = torch.zeros(1)
        feed(alone, tokens, [240])
        for head in range(KV_HEADS):
            assert [slot - 60 for slot in kept_slots(cache, 1, head)] == kept_slots(alone, 0, head), policy


# -- bytes, and how tokens arrive -------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data())
def test_bytes_are_those_of_the_plan(tmp_path_factory, data):
    plan, batch = data.draw(evicting_plans()), data.draw(st.integers(1, 2))
    prompt, decoded = data.draw(st.integers(1, 600)), data.draw(st.integers(0, 150))
    cache = new_cache(plan)
    feed(cache, stream(plan, prompt + decoded, batch=batch), [prompt, *[1] * decoded])
    planned = plan.nbytes(batch, prompt + decoded, "float32", decoded=decoded)
    assert cache.nbytes() == planned
    assert cache.get_seq_length() == prompt + decoded
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    cache.save(path)
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == cache.nbytes()
    assert_same(LoomCache.load(path, plan, config(plan)), cache)


def config(plan):
    return config_of(plan.model.head_dim)


@EXAMPLES
@given(st.data())
def test_a_prompt_in_pieces_leaves_what_it_leaves_in_one(data):
    plan, tokens = data.draw(evicting_plans()), data.draw(st.integers(2, 500))
    batch = data.draw(st.integers(1, 2))
    padding = [data.draw(st.integers(0, tokens - 1)) for _ in range(batch)]
    parts = stream(plan, tokens, batch=batch, padding=padding)
    once, pieces = new_cache(plan), new_cache(plan)
    feed(once, parts, [tokens])
    pieces.expect_prompt(tokens)
    feed(pieces, parts, data.draw(cuts(tokens)))
    ours, theirs = contents(once), contents(pieces)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith("mass"):
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)
        else:
            assert tensor.equal(theirs[name]), name


# -- later ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o"])
def test_the_ceiling_holds_at_every_step(policy):
    plan = evicting(plan_of(), policy, 160)
    tokens, cache = stream(plan, 700, batch=2), new_cache(plan)
    feed(cache, tokens, [50])
    for at in range(50, 700):
        feed(cache, tokens, [1], at)
        held = {len(kept_slots(cache, row, head)) for row in range(2) for head in range(KV_HEADS)}
        assert held == {plan.room(0).resident(at + 1, at + 1 - 50)}
        assert max(held) <= 160
        assert cache.nbytes() == plan.nbytes(2, at + 1, "float32", decoded=at + 1 - 50)
    if policy == "streaming_llm":
        slots = kept_slots(cache, 1, 1)
        assert slots == [0, 1, 2, 3, *range(700 - len(slots) + 4, 700)]
    else:
        assert kept_slots(cache, 1, 1)[-6:] == list(range(694, 700))


@pytest.mark.parametrize("seed", range(3))
def test_the_page_that_received_least_attention_leaves(seed):
    plan = evicting(plan_of(EXACT), "h2o", 264)
    tokens, cache = stream(plan, 265, seed=seed), new_cache(plan)
    received = torch.zeros(KV_HEADS, 265, dtype=torch.float64)
    pages, group = [list(range(4 + 64 * n, 68 + 64 * n)) for n in range(3)], QUERY_HEADS // KV_HEADS
    for at in range(265):
        feed(cache, tokens, [1], at)
        for head in range(KV_HEADS):
            logits = tokens.query[0, head * group : (head + 1) * group, at].double()
            logits = logits @ tokens.key[0, head, : at + 1].double().T * SCALING
            received[head, : at + 1] += torch.softmax(logits, -1).mean(0)
    for head in range(KV_HEADS):
        gone = sorted(set(range(265)) - set(kept_slots(cache, 0, head)))
        assert gone == min(pages, key=lambda page: float(received[head, page].sum()))


@EXAMPLES
@given(st.data())
def test_a_second_turn_keeps_within_the_budget(data):
    policy = data.draw(st.sampled_from(sorted(set(POLICIES) - {"pyramidkv"})))
    plan = evicting(data.draw(plans(prefill="exact")), policy, 0.4)
    layer_sinks, size = plan.layers[0].window.sinks, page_size(plan)
    turns = [data.draw(st.integers(2, 300)) for _ in range(3)]
    decoded = data.draw(st.integers(0, 70))
    tokens, cache = stream(plan, sum(turns) + 3 * decoded), new_cache(plan)
    start = 0
    for turn in turns:
        feed(cache, tokens, [turn], start)
        start += turn
        layer, room = cache.packed_layers[0], plan.room(0)
        limit = room.limit(start)
        assert layer._resident() <= limit
        held = [kept_slots(cache, 0, head) for head in range(KV_HEADS)]
        for slots in held:
            assert slots == sorted(set(slots))
            assert slots[:layer_sinks] == list(range(min(start, layer_sinks)))
            assert set(range(max(0, start - min(turn, room.newest(limit))), start)) <= set(slots)
        assert sum(map(len, held)) == KV_HEADS * layer._resident()
        assert layer.tail.tokens < size + max(room.exact(limit), turn)
        feed(cache, tokens, [1] * decoded, start)
        start += decoded


def records(cache):
    layer = cache.packed_layers[0]
    return [record for kept in layer.kept for record in kept.data]


def test_pages_are_dropped_whole_and_never_encoded_again():
    plan = evicting(plan_of(EIGHT), "snapkv", 300)
    tokens, cache = stream(plan, 900), new_cache(plan)
    feed(cache, tokens, [500])
    before = {bytes(record.tolist()) for record in records(cache)}
    first = [set(kept_slots(cache, 0, head)) for head in range(KV_HEADS)]
    feed(cache, tokens, [400], 500)
    after = {bytes(record.tolist()) for record in records(cache)}
    assert before & after
    assert before - after
    for head in range(KV_HEADS):
        again = {slot for slot in kept_slots(cache, 0, head) if slot < 500}
        assert again < first[head]
        assert max(kept_slots(cache, 0, head)) == 899


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_protected_spans_stay(policy):
    protect = ((0, 64), (200, 230))
    plan = evicting(plan_of(), policy, 420, protect=protect)
    tokens, cache = stream(plan, 1400, batch=2, padding=(0, 10)), new_cache(plan)
    safe = {slot for start, end in protect for slot in range(start, end)}
    feed(cache, tokens, [600])
    feed(cache, tokens, [1] * 200, 600)
    feed(cache, tokens, [600], 800)
    for row in range(2):
        for head in range(KV_HEADS):
            slots = set(kept_slots(cache, row, head))
            assert {slot + int(tokens.padding[row]) for slot in safe} <= slots
            assert len(slots) <= 420 or policy in ("adakv", "pyramidkv")


# -- the batch, files, failures ---------------------------------------------------------------------------------------


@FEWER
@given(st.data())
def test_sequences_are_reordered_with_all_they_hold(data):
    plan = data.draw(evicting_plans())
    tokens = stream(plan, 420, batch=3, padding=(0, 20, 5))
    cache, order = new_cache(plan), torch.tensor(data.draw(st.permutations(range(3))))
    feed(cache, tokens, [300, *[1] * 20])
    cache.reorder_cache(order)
    tokens.key, tokens.value, tokens.query = (x[order] for x in (tokens.key, tokens.value, tokens.query))
    tokens.padding = tokens.padding[order]
    straight = new_cache(plan)
    feed(straight, tokens, [300, *[1] * 20])
    assert_same(cache, straight)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    layer = cache.packed_layers[0]
    assert layer.batch_size == 4
    for head in range(KV_HEADS):
        rows = [kept_slots(cache, row, head) for row in range(4)]
        assert rows == [kept_slots(straight, row, head) for row in (2, 2, 0, 0)]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_saved_cache_goes_on(policy, tmp_path):
    plan = evicting(plan_of(), policy, 200)
    tokens, cache = stream(plan, 600, batch=2, padding=(0, 9)), new_cache(plan)
    feed(cache, tokens, [300, *[1] * 30])
    cache.save(tmp_path / "cache.safetensors")
    again = LoomCache.load(tmp_path / "cache.safetensors", plan, config(plan))
    for way in (cache, again):
        feed(way, tokens, [*[1] * 70, 200], 330)
    assert_same(cache, again)


def test_a_damaged_file_is_refused():
    plan = evicting(plan_of(), "h2o", 200)
    cache = new_cache(plan)
    feed(cache, stream(plan, 300), [300])
    layer = cache.packed_layers[0]
    tensors = dict(layer.tensors())
    shorter = {name: tensor[:-1] for name, tensor in tensors.items()}
    other = {name: tensor.to(torch.int64) for name, tensor in tensors.items()}
    for name, bad in [*shorter.items(), *other.items()]:
        with pytest.raises(CacheError, match="do not have the sizes this plan gives them"):
            copy.deepcopy(layer).restore({**tensors, name: bad}, 300)
    more = {**tensors, "pages.0.counts": tensors["pages.0.counts"] * 2}
    with pytest.raises(CacheError, match="do not have the sizes"):
        copy.deepcopy(layer).restore(more, 300)


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    plan = evicting(plan_of(), "h2o", 200)
    tokens, cache = stream(plan, 600), new_cache(plan)
    feed(cache, tokens, [300])
    before = contents(cache)
    tokens.key[:, :, 350] = torch.nan
    with pytest.raises(CacheError, match="NaN"):
        feed(cache, tokens, [300], 300)
    after = contents(cache)
    assert cache.get_seq_length() == 300
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    tokens.key[:, :, 350] = 0.0
    feed(cache, tokens, [300], 300)
    assert cache.get_seq_length() == 600


def test_a_piece_of_a_prompt_that_fails_is_undone_and_held_once():
    spec = dict.fromkeys(range(2), (EIGHT, EIGHT))
    of = config_of(16, layers=2)
    plan = evicting(Plan.from_specs(Fingerprint.of(of), spec, window=Window(sinks=4)), "h2o", 200)
    tokens, cache = stream(plan, 600), LoomCache(plan, of)

    def piece(start, stop, layer, dtype=torch.float32):
        part = slice(start, stop)
        handle, _ = cache.update(tokens.key[:, :, part].to(dtype), tokens.value[:, :, part].to(dtype), layer)
        loom_attention(torch.nn.Module(), tokens.query[:, :, part], handle, handle, None, scaling=SCALING)

    cache.expect_prompt(600)
    for layer in range(2):
        piece(0, 200, layer)
    before, first = contents(cache), weakref.ref(cache.packed_layers[0].tail.key)
    piece(200, 400, 0)
    assert first() is None
    with pytest.raises(CacheError, match=r"holds torch\.float32 states and got torch\.float16"):
        piece(200, 400, 1, torch.float16)
    after = contents(cache)
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    for start in (200, 400):
        for layer in range(2):
            piece(start, start + 200, layer)
    once = new_cache(plan_of_one(plan))
    feed(once, tokens, [600])
    for name, tensor in contents(once).items():
        if "mass" not in name:
            assert tensor.equal(contents(cache)[name]), name


def plan_of_one(plan):
    entry = plan.layers[0].model_copy(update={"layers": 0})
    return Plan(model=Fingerprint.of(config_of(16)), layers=(entry,))


def test_places_beyond_16_bits_take_four_bytes(monkeypatch):
    monkeypatch.setattr(_room, "_SHORT", 320)
    plan = evicting(plan_of(), "h2o", 200)
    tokens, cache = stream(plan, 500, batch=2), new_cache(plan)
    feed(cache, tokens, [300, *[1] * 20])
    layer = cache.packed_layers[0]
    before = kept_slots(cache, 1, 1)
    assert layer.tail_slots.dtype == torch.int16
    assert layer.nbytes() == plan.nbytes(2, 320, "float32", decoded=20)
    feed(cache, tokens, [1], 320)
    assert {x.dtype for name, x in layer.tensors() if name.endswith("slots")} == {torch.int32}
    assert layer.nbytes() == plan.nbytes(2, 321, "float32", decoded=21)
    assert kept_slots(cache, 1, 1) == [*before, 320]
    feed(cache, tokens, [179], 321)
    assert layer.nbytes() <= plan.nbytes(2, 500, "float32")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_places_are_read_as_they_were_stored(dtype):
    numbers = torch.tensor([0, 1, 32767, 32768, 65535])
    assert stored(numbers, dtype).dtype == dtype
    assert places(stored(numbers, dtype)).equal(numbers)


def test_a_copy_goes_its_own_way():
    plan = evicting(plan_of(), "h2o", 200)
    tokens, cache = stream(plan, 500), new_cache(plan)
    feed(cache, tokens, [300])
    other = copy.deepcopy(cache)
    feed(other, tokens, [1] * 100, 300)
    assert (cache.get_seq_length(), other.get_seq_length()) == (300, 400)
    feed(cache, tokens, [1] * 100, 300)
    assert_same(cache, other)
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length()) == (0, 0)
    feed(cache, tokens, [300])
    assert cache.nbytes() == plan.nbytes(1, 300, "float32")


def test_what_cannot_be_done_is_said():
    plan = evicting(plan_of(), "snapkv", 200)
    tokens, cache = stream(plan, 500), new_cache(plan)
    with pytest.raises(CacheError, match="a prompt has at least one token, not 0"):
        cache.expect_prompt(0)
    cache.expect_prompt(300)
    feed(cache, tokens, [100])
    with pytest.raises(CacheError, match="in the middle of a prompt"):
        cache.save("nowhere")
    feed(cache, tokens, [200], 100)
    with pytest.raises(CacheError, match="cannot crop 3 tokens"):
        cache.crop(-3)
    with pytest.raises(CacheError, match="cannot decode with an assistant"):
        cache.packed_layers[0].activate_past_recording()
    cache.update(tokens.key[:, :, :1], tokens.value[:, :, :1], 0)
    with pytest.raises(CacheError, match="nothing attended to the tokens appended last"):
        cache.update(tokens.key[:, :, :1], tokens.value[:, :, :1], 0)


def test_without_enable_nothing_is_evicted():
    plan = evicting(plan_of(), "snapkv", 200)
    of = config(plan)
    of._attn_implementation = "sdpa"
    tokens = stream(plan, 10)
    with pytest.raises(CacheError, match=r"a plan that evicts needs attention .*: call kvloom\.enable\(model\)"):
        LoomCache(plan, of).update(tokens.key, tokens.value, 0)


def test_a_prompt_that_is_chosen_from_is_read_exactly():
    plan = evicting(plan_of(), "snapkv", 200).model_copy(update={"prefill": "quantized"})
    with pytest.raises(PlanError, match="layers 0: evict chooses among tokens read exactly"):
        new_cache(plan)
