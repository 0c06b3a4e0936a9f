"""Which bytes of a block hold what: one layer's part of vLLM's blocks, and the plans they can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvloom.errors import PlanError
from kvloom.pages import PageLayout
from kvloom.plan import Plan, format_layers, head_layouts, itemsize


@dataclass(frozen=True)
class BlockLayout:
    """One layer's part of a block: the bytes of one page of every KV head of a rank.

    Sinks lie in the first block of a sequence; page ``p`` then lies in block ``p + 1``, and without sinks in block
    ``p``. The exact tokens of a page that is not full lie in the blocks after the one that will hold the page, as many
    whole tokens as each has room for, a token as ``[2, kv_heads, head_dim]``, its keys before its values: the page can
    be packed from where they are. Sinks likewise.

    Attributes:
        layouts: Page layout of each KV head.
        sinks: First tokens of a sequence, exact.
        itemsize: Bytes of the compute dtype.
        nbytes: Bytes of the layer in a block: those of the pages, and more where another rank's pages have more.
    """

    layouts: tuple[PageLayout, ...]
    sinks: int
    itemsize: int
    nbytes: int

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return len(self.layouts)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.layouts[0].head_dim

    @property
    def page_tokens(self) -> int:
        """Tokens in a page, which are those of a block."""
        return self.layouts[0].page_tokens

    @property
    def token_nbytes(self) -> int:
        """Bytes of an exact token."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def block_tokens(self) -> int:
        """Exact tokens that a block has room for."""
        return self.nbytes // self.token_nbytes

    @property
    def first_page(self) -> int:
        """Number of the block, within a sequence, that holds page 0."""
        return 1 if self.sinks else 0

    def exact_column(self, pages: int) -> int:
        """Number of the block, within a sequence, where the exact tokens behind so many full pages begin."""
        return self.first_page + pages + 1

    @cached_property
    def spare_blocks(self) -> int:
        """Most blocks that a sequence needs besides those vLLM counts, one for every ``page_tokens`` tokens."""
        return max(
            self.exact_column(0) - (-exact // self.block_tokens) + (-(self.sinks + exact) // self.page_tokens)
            for exact in range(1, self.page_tokens + 1)
        )

    @cached_property
    def groups(self) -> tuple[tuple[tuple[int, ...], PageLayout, int, int], ...]:
        """KV heads that share a page layout, the layout, and where their records start and end within the block."""
        heads: dict[PageLayout, list[int]] = {}
        for head, layout in enumerate(self.layouts):
            heads.setdefault(layout, []).append(head)
        found, start = [], 0
        for layout, own in heads.items():
            stop = start + len(own) * layout.nbytes
            found.append((tuple(own), layout, start, stop))
            start = stop
        return tuple(found)

    def full_pages(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens fill."""
        return max(0, tokens - self.sinks) // self.page_tokens


def part_of(plan: Plan, rank: int, world_size: int) -> Plan:
    """The part of one rank, as vLLM splits KV heads (``QKVParallelLinear``): see `kvloom.Plan.shard`.

    Ranks that are more than the heads hold one head, each of them on as many ranks.

    Args:
        plan: What each layer stores.
        rank: Which, from 0.
        world_size: Number of ranks (``--tensor-parallel-size``).

    Raises:
        ModelError: See `kvloom.Plan.shard`.
        PlanError: See `kvloom.Plan.shard`.
    """
    heads = plan.model.num_kv_heads
    copies = 1 if world_size % heads else max(1, world_size // heads)
    return plan.shard(rank // copies, world_size // copies)


def block_layouts(plan: Plan, dtype: object, rank: int = 0, world_size: int = 1) -> dict[int, BlockLayout]:
    """Layouts by layer, of one of the ranks that share the KV heads (tensor parallelism).

    A layer has the same bytes on all of them, as vLLM asks: those of the rank whose heads need most.

    Args:
        plan: What each layer stores, of all KV heads.
        dtype: Compute dtype (name or torch dtype).
        rank: Which, from 0.
        world_size: Number of ranks (``--tensor-parallel-size``).

    Raises:
        ModelError: There is no such rank, or the KV heads cannot be split evenly.
        PlanError: Blocks cannot hold what the plan asks for; the message names the field.
    """
    _refuse_entries(plan)
    own, parts = part_of(plan, rank, world_size), [part_of(plan, each, world_size) for each in range(world_size)]
    found = {i: _layout(i, own, parts, itemsize(dtype)) for i in plan.model.packed_layers}
    _refuse_layouts(found)
    return found


def spare_blocks(layouts: Mapping[int, BlockLayout]) -> int:
    """Blocks that every sequence has besides those of its tokens: what the layer that packs best needs."""
    return max(layout.spare_blocks for layout in layouts.values())


def block_nbytes(plan: Plan, dtype: object = None, world_size: int = 1) -> int:
    """Bytes of a block of vLLM's cache on one rank, all layers together: every byte of it is one of these.

    All ranks have the same; where layers are split, too (pipeline parallelism), a rank has those of its own layers,
    which `block_layouts` names.

    Args:
        plan: What each layer stores, of all KV heads.
        dtype: Compute dtype (name or torch dtype); None takes the model's.
        world_size: Number of ranks that share the KV heads (``--tensor-parallel-size``).

    Raises:
        ModelError: See `block_layouts`.
        PlanError: See `block_layouts`.
    """
    layouts = block_layouts(plan, dtype or plan.model.dtype, world_size=world_size)
    return sum(layout.nbytes for layout in layouts.values())


def _layout(layer: int, own: Plan, parts: Sequence[Plan], size: int) -> BlockLayout:
    nbytes = max(sum(page.nbytes for page in _pages(part, layer, size)) for part in parts)
    return BlockLayout(_pages(own, layer, size), own.spec(layer).window.sinks, size, nbytes)


def _pages(part: Plan, layer: int, size: int) -> tuple[PageLayout, ...]:
    return head_layouts(part.spec(layer), part.model.num_kv_heads, part.model.head_dim, size)


def _refuse_entries(plan: Plan) -> None:
    plan.check_codebooks()
    for entry in plan.layers:
        if entry.evict is not None:
            raise PlanError(
                f"layers {entry.layers}: evict is set, and vLLM keeps every token of a running request: leave it out."
            )
        if entry.window.recent or entry.window.recent_ratio:
            raise PlanError(
                f"layers {entry.layers}: window.recent or recent_ratio is set, and in vLLM's blocks the newest tokens "
                "are exact just until their page is full: leave it out."
            )
    if plan.pre_rope_layers:
        raise PlanError(
            f"layers {format_layers(list(plan.pre_rope_layers))}: key.pre_rope is set, and vLLM hands over keys after "
            "their rotary embedding: leave it out."
        )


def _refuse_layouts(layouts: Mapping[int, BlockLayout]) -> None:
    tokens = sorted({layout.page_tokens for layout in layouts.values()})
    if len(tokens) > 1:
        raise PlanError(
            f"group_size makes pages of {tokens} tokens, and a block of vLLM is one page of every layer: give all "
            f"per_channel groups at most {tokens[0]} tokens, or one group of every layer {tokens[-1]}."
        )
    sinks = sorted({layout.sinks for layout in layouts.values()})
    if len(sinks) > 1:
        raise PlanError(
            f"window.sinks differ between layers ({sinks}), and a prefix that vLLM shares ends at one token for all: "
            "give all layers the same."
        )
    for i, layout in layouts.items():
        if layout.sinks > min(layout.page_tokens, layout.block_tokens):
            raise PlanError(
                f"layer {i}: {layout.sinks} window.sinks take {layout.sinks * layout.token_nbytes} exact bytes, and "
                f"the block of {layout.nbytes} bytes that is to hold them has room for "
                f"{layout.block_tokens}: ask for fewer sinks, or more bits."
            )
