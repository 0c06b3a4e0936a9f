"""Positions and rotations that appending and attending know themselves, against doing them by hand first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvloom import kernels
from kvloom.cache import SideRotation, side_rotation
from kvloom.kernels import _cuda_launch
from kvloom.kernels._torch import TORCH
from kvloom.kernels._turns import Rope, roped
from kvloom.pages import ExactKV, Format, HeadPages, PageLayout, Rotation, StaticKV, page_layout
from tests.kernels.pooled import pooled

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KV_HEADS, SINKS, TAIL = 3, 3, 41
WITHIN = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
KINDS: list[tuple[Rotation | None, Rotation | None]]
KINDS = [("hadamard", "hadamard"), ("hadamard", None), (None, "hadamard"), ("calibrated", "hadamard"), (None, None)]


def layouts_of(dim: int, rotations: Sequence[Rotation | None], *, mixed: bool, itemsize: int) -> list[PageLayout]:
    """Of each KV head; one of them is not turned where they are mixed."""
    key, value = Format(4, "per_channel", 64), Format(3, "per_token", dim)
    turned = [replace(fmt, rotation=name) for fmt, name in zip((key, value), rotations, strict=True)]
    one = [key, value] if mixed and "calibrated" not in rotations else turned
    each = [page_layout(*fmts, dim, itemsize) for fmts in (turned, one)]
    return [each[0], each[1], each[0]]


def rotation_of(layouts: list[PageLayout], role: str, dtype: torch.dtype, device: torch.device) -> SideRotation | None:
    sides = [getattr(layout, role) for layout in layouts]
    dim = sides[0].head_dim
    generator = torch.Generator().manual_seed(dim)
    matrices = torch.linalg.qr(torch.randn(KV_HEADS, dim, dim, generator=generator))[0].half()
    return side_rotation(sides, matrices, dtype, device)


def filled(layouts: list[PageLayout], pages: int, dtype: torch.dtype, device: torch.device, batch: int = 2) -> StaticKV:
    """A cache of random states: so many full pages, sinks and a tail, room for more."""
    generator = torch.Generator().manual_seed(pages)
    dim, tokens = layouts[0].head_dim, layouts[0].page_tokens

    def states(heads: int, count: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, dim, generator=generator).to(device, dtype)

    by_layout: dict[PageLayout, list[int]] = {}
    for head, layout in enumerate(layouts):
        by_layout.setdefault(layout, []).append(head)
    groups = []
    for layout, heads in by_layout.items():
        data = torch.zeros(batch, len(heads), pages + 2, layout.nbytes, dtype=torch.uint8, device=device)
        data[:, :, :pages] = TORCH.encode(*(states(len(heads), pages * tokens) for _ in range(2)), layout)
        groups.append(HeadPages(tuple(heads), layout, data))
    length = SINKS + pages * tokens + TAIL
    capacity = SINKS + (pages + 2) * tokens
    counts = torch.tensor([max(0, n - SINKS) // tokens for n in range(capacity + 1)])
    state = torch.zeros(2 * batch + 1 + 4 * batch * KV_HEADS, dtype=torch.int32, device=device)
    state[: 2 * batch] = torch.tensor([length, pages] * batch)
    exact = [ExactKV(states(KV_HEADS, count), states(KV_HEADS, count)) for count in (SINKS, tokens)]
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    return StaticKV(tuple(groups), *exact, state, flags, counts.to(device, torch.int32), tokens)


def tabled(kv: StaticKV) -> StaticKV:
    """The same, found through a table."""
    batch, _, pages, _ = kv.pages[0].data.shape
    shared = tuple(replace(group, data=group.data.transpose(0, 1).flatten(1, 2)[None]) for group in kv.pages)
    return replace(kv, pages=shared, table=torch.arange(batch * pages, device=kv.device).view(batch, -1).int())


def rope_of(dim: int, dtype: torch.dtype, device: torch.device, batch: int) -> Rope:
    angles = torch.rand(batch, 1, dim, generator=torch.Generator().manual_seed(1)) * 6
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def by_hand(query: torch.Tensor, kv: StaticKV, rope: Rope, turns: Sequence[SideRotation | None]) -> torch.Tensor:
    """In fp64 but for the positions, which are rounded as a model rounds them."""
    query = roped(query, rope).double()
    key, value = turns
    tokens, pages = kv.levels()[0].tolist()
    own = kv.paged(slice(None), tokens, pages)
    states = [x.double() for x in TORCH.all_states(own)]
    group = query.shape[1] // KV_HEADS
    if key is not None:
        query = torch.einsum("bhqd,hde->bhqe", query, _each(key.dual, group))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.repeat_interleave(group, dim=1) for x in states), scale=0.1
    )
    if value is not None:
        out = torch.einsum("bhqe,hde->bhqd", out, _each(value.dual, group))
    return out.transpose(1, 2)


def _each(matrix: torch.Tensor, group: int) -> torch.Tensor:
    return matrix.double().expand(KV_HEADS, -1, -1).repeat_interleave(group, dim=0)


def check(
    layouts: list[PageLayout], pages: int, dtype: torch.dtype, device: torch.device, group: int, *, one_rope: bool
) -> None:
    dim, batch = layouts[0].head_dim, 2
    turns = [rotation_of(layouts, role, dtype, device) for role in ("key", "value")]
    kv = filled(layouts, pages, dtype, device, batch)
    kv = replace(
        kv,
        query_turn=None if turns[0] is None else turns[0].dual,
        output_turn=None if turns[1] is None else turns[1].output_turn,
    )
    rope = rope_of(dim, dtype, device, 1 if one_rope else batch)
    generator = torch.Generator().manual_seed(group)
    query = torch.randn(batch, 1, KV_HEADS * group, dim, generator=generator).to(device, dtype).transpose(1, 2)
    expected = by_hand(query, kv, rope, turns)
    backend = kernels.backend(device)
    outs = [backend.attend_static(query, kv, rope, scaling=0.1)]
    outs += [backend.attend_static(roped(query, rope), kv, scaling=0.1)]
    for out in outs:
        assert out.dtype == dtype
        assert float((out.double() - expected).norm() / expected.norm()) < WITHIN[dtype]
    blocks = replace(pooled(tabled(kv), 1)[0], query_turn=kv.query_turn, output_turn=kv.output_turn)
    out = torch.full_like(outs[0], torch.nan)
    assert backend.attend_pooled(roped(query, rope), blocks, out, scaling=0.1) is out
    assert float((out.double() - expected).norm() / expected.norm()) < WITHIN[dtype]


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("one_rope", [False, True])
def test_positions_are_transformers(dim: int, dtype: torch.dtype, one_rope: bool):
    query, key = (torch.randn(3, 1, heads, dim).to(dtype).transpose(1, 2) for heads in (8, 2))
    rope = rope_of(dim, dtype, CPU, 1 if one_rope else 3)
    for ours, theirs in zip(
        (roped(query, rope), roped(key, rope)), apply_rotary_pos_emb(query, key, *rope), strict=True
    ):
        assert ours.equal(theirs)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rotations", KINDS)
@pytest.mark.parametrize("dim", [64, 80])
def test_queries_and_outputs_are_turned(dim: int, rotations: tuple[Rotation | None, Rotation | None], mixed: bool):
    layouts = layouts_of(dim, rotations, mixed=mixed, itemsize=4)
    check(layouts, 2, torch.float32, CPU, 2, one_rope=mixed)


@pytest.mark.parametrize("rotations", KINDS)
def test_keys_get_their_positions(rotations: tuple[Rotation | None, Rotation | None]):
    compare_appended(layouts_of(64, rotations, mixed=True, itemsize=4), torch.float32, CPU)


def compare_appended(layouts: list[PageLayout], dtype: torch.dtype, device: torch.device) -> None:
    """A page fills on the way."""
    ours, theirs = (filled(layouts, 1, dtype, device) for _ in range(2))
    dim = layouts[0].head_dim
    generator = torch.Generator().manual_seed(7)
    for step in range(30):
        rope = rope_of(dim, dtype, device, 1 + step % 2)
        key, value = torch.randn(2, 2, 1, KV_HEADS, dim, generator=generator).to(device, dtype).transpose(2, 3)
        kernels.backend(device).append(key, value, ours, rope)
        TORCH.append(roped(key, rope), value, theirs)
    assert ours.state.equal(theirs.state)
    assert int(ours.levels()[0, 1]) == 2
    for one, other in zip(ours.pages, theirs.pages, strict=True):
        assert one.data.equal(other.data)
    for one, other in ((ours.sinks, theirs.sinks), (ours.tail, theirs.tail)):
        assert one.key.equal(other.key)
        assert one.value.equal(other.value)
    assert not ours.flags.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotations", KINDS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_kernels_give_keys_their_positions(dim: int, rotations: tuple[Rotation | None, ...], dtype: torch.dtype):
    compare_appended(layouts_of(dim, rotations, mixed=dim != 80, itemsize=2), dtype, GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotations", KINDS)
@pytest.mark.parametrize(
    ("dim", "pages", "group"), [(64, 3, 1), (80, 40, 4), (96, 90, 16), (128, 0, 4), (128, 150, 4), (256, 30, 8)]
)
def test_kernels_turn(
    dim: int, pages: int, group: int, rotations: tuple[Rotation | None, ...], dtype: torch.dtype
) -> None:
    layouts = layouts_of(dim, rotations, mixed=pages % 20 == 10, itemsize=2)
    check(layouts, pages, dtype, GPU, group, one_rope=group == 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [80, 128, 256])
def test_kernels_turn_without_clusters(dim: int, monkeypatch: pytest.MonkeyPatch):
    """What other GPUs than Hopper do, and splits that are too many for a cluster."""
    _cuda_launch.merges_in_cluster.cache_clear()
    monkeypatch.setattr(_cuda_launch, "has_clusters", lambda _: False)
    check(layouts_of(dim, KINDS[0], mixed=False, itemsize=2), 60, torch.bfloat16, GPU, 4, one_rope=False)
    _cuda_launch.merges_in_cluster.cache_clear()
