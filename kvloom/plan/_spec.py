"""What one tensor, one head, one layer stores: the validated leaves of a plan."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from kvloom.eviction import Policy, make
from kvloom.pages import GROUP_SIZES, PASSTHROUGH_BITS, Codebook, Format, Grouping, Rotation, codec_facts

Bits = Literal[1, 2, 3, 4, 5, 6, 8, 16]
GroupSize = Literal[11, 16, 32, 64, 128, 256, "head_dim"]

_MOST_LAYERS = 2**16
"""Layers beyond these are no model's: a slip of the pen must not fill the memory."""

_GROUPING_LABEL = {"per_channel": "ch", "per_token": "tok"}


class PlanModel(BaseModel):
    """Base of everything in a plan file: frozen, and a field nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(PlanModel):
    """Number format of a layer's keys or values.

    Attributes:
        codec: Name of the number format (codecs room); 16 bits have none.
        bits: Code width; 16 keeps the elements as they come, in the compute dtype.
        grouping: ``per_channel``: a group is ``group_size`` consecutive tokens of one channel; ``per_token``:
            ``group_size`` consecutive channels of one token.
        group_size: Elements that share a scale; ``"head_dim"`` (``per_token`` only) is a token's whole head, and 11 is
            for codec ``kvmix3`` alone.
        symmetric: Centre the grid on zero and store no zero point.
        rotation: ``hadamard`` turns each head's channels by a randomised Hadamard transform first, which spreads
            outlier channels; queries and outputs are turned to match (`kvloom.codecs.rotated`). ``calibrated`` takes a
            matrix of each KV head from the plan's tensors (`kvloom.calibrate`).
        codebook: The calibrated points of codec ``nuq``, ``2**bits`` rising numbers in [-1, 1]; stored and used in
            fp16. ``kvloom calibrate`` fills them in; a cache refuses a plan that lacks them.
        outliers: Share of the elements that are kept in fp16, with an index, in 4 bytes each: those farthest outside
            their groups, whose scales are computed without them (`kvloom.codecs.split`). Whole 16 bytes of them a page.
        pre_rope: Pack keys as they were before their rotary embedding (`kvloom.cache.Rope`); not for values.
    """

    codec: str = "affine"
    bits: Bits
    grouping: Grouping
    group_size: GroupSize = 64
    symmetric: bool = Field(default=False, validate_default=True)
    rotation: Rotation | None = None
    codebook: Codebook | None = None
    outliers: float = Field(default=0.0, ge=0.0, le=0.125)
    pre_rope: bool = False

    @field_validator("codec")
    @classmethod
    def _codec_is_known(cls, codec: str) -> str:
        codec_facts(codec)
        return codec

    @field_validator("bits")
    @classmethod
    def _codec_takes_bits(cls, bits: Bits, info: ValidationInfo) -> Bits:
        if "codec" in info.data and bits != PASSTHROUGH_BITS:
            codec_facts(info.data["codec"]).check_bits(info.data["codec"], bits)
        return bits

    @field_validator("symmetric")
    @classmethod
    def _codec_takes_symmetric(cls, symmetric: bool, info: ValidationInfo) -> bool:
        if "codec" in info.data and info.data.get("bits", PASSTHROUGH_BITS) != PASSTHROUGH_BITS:
            codec_facts(info.data["codec"]).check_symmetric(info.data["codec"], symmetric)
        return symmetric

    @field_validator("codebook")
    @classmethod
    def _codec_takes_codebook(cls, codebook: Codebook | None, info: ValidationInfo) -> Codebook | None:
        if codebook is not None and info.data.get("bits") == PASSTHROUGH_BITS:
            raise ValueError("codebook has no meaning for 16 bits, which have no codes: leave it out")
        if "codec" in info.data and "bits" in info.data:
            codec_facts(info.data["codec"]).check_codebook(info.data["codec"], info.data["bits"], codebook)
        return codebook

    @model_validator(mode="after")
    def _group_fits_grouping(self) -> TensorSpec:
        if self.grouping == "per_channel" and self.group_size == "head_dim":
            raise ValueError(
                "group_size 'head_dim' has no meaning for per_channel groups, which span tokens: use one of "
                f"{GROUP_SIZES}"
            )
        if self.bits != PASSTHROUGH_BITS:
            self._check_codec()
        if self.rotation and self.bits == PASSTHROUGH_BITS:
            raise ValueError("rotation has no meaning for 16 bits, which round nothing: leave it out")
        if self.outliers and self.bits == PASSTHROUGH_BITS:
            raise ValueError("outliers have no meaning for 16 bits, which keep every element: leave them out")
        if self.pre_rope and self.bits == PASSTHROUGH_BITS:
            raise ValueError("pre_rope has no meaning for 16 bits, which round nothing: leave it out")
        if self.pre_rope and self.rotation:
            raise ValueError(
                "pre_rope and rotation cannot both be set, since queries are turned by one matrix and keys before RoPE "
                "by one a token: choose one of them"
            )
        return self

    def _check_codec(self) -> None:
        facts = codec_facts(self.codec)
        facts.check_group(self.codec, self.grouping, self.group_size)
        facts.check_outliers(self.codec, self.outliers)
        if self.group_size not in (*GROUP_SIZES, "head_dim", facts.group_size):
            raise ValueError(f"group_size {self.group_size} is not for codec {self.codec!r}: use one of {GROUP_SIZES}")

    def format(self, head_dim: int) -> Format:
        """The spec with its group size resolved for ``head_dim``."""
        size = head_dim if self.group_size == "head_dim" else self.group_size
        return Format(
            self.bits,
            self.grouping,
            size,
            self.symmetric,
            self.codec,
            self.rotation,
            self.codebook,
            outliers=self.outliers,
            pre_rope=self.pre_rope,
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether the codec needs a calibrated codebook."""
        return self.bits != PASSTHROUGH_BITS and codec_facts(self.codec).is_calibrated

    @property
    def label(self) -> str:
        """Short name for tables, e.g. ``4b/ch64``, ``2b/tok-head`` or, with more to say, ``2b/tok32/hqq/hadamard``.

        ``/out1%`` says how many outliers are kept, ``/pre-rope`` that keys are packed before their rotary embedding.

        An ``s`` after the group size says symmetric, unless the codec takes no other format.
        """
        if self.bits == PASSTHROUGH_BITS:
            return "16b"
        size = "-head" if self.group_size == "head_dim" else str(self.group_size)
        symmetric = "s" if self.symmetric and codec_facts(self.codec).asymmetric else ""
        more = "".join(f"/{name}" for name in (self.codec, self.rotation) if name not in ("affine", None))
        kept = f"/out{100 * self.outliers:g}%" if self.outliers else ""
        before = "/pre-rope" if self.pre_rope else ""
        return f"{self.bits}b/{_GROUPING_LABEL[self.grouping]}{size}{symmetric}{more}{kept}{before}"


class Window(PlanModel):
    """Tokens kept exact, in the compute dtype, besides those that do not fill a page yet.

    Attributes:
        sinks: First tokens of the sequence (slots, so padding counts where a batch is left-padded).
        recent: At least this many of the newest tokens.
        recent_ratio: At least this share of all tokens, newest first; excludes ``recent``.
    """

    sinks: int = Field(default=0, ge=0)
    recent: int = Field(default=0, ge=0)
    recent_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _one_way_to_say_recent(self) -> Window:
        if self.recent and self.recent_ratio:
            raise ValueError("give recent (a number of tokens) or recent_ratio (a share of all tokens), not both")
        return self


class Evict(PlanModel):
    """Which tokens to keep (eviction room); the sinks and the newest tokens of the window are never evicted.

    Attributes:
        policy: Name of the policy.
        budget: Tokens kept per KV head (the mean, where heads or layers compete), or a share of all tokens seen.
        protect: ``[start, end)`` spans that are never evicted, e.g. a system prompt; counted from the first real token
            of a sequence, whatever padding is before it.
        parameters: The policy's parameters that differ from their defaults.
    """

    policy: str
    budget: int | float = Field(gt=0)
    protect: tuple[tuple[int, int], ...] = ()
    parameters: dict[str, int | float | str | bool | None] = Field(default_factory=dict)

    @field_validator("budget")
    @classmethod
    def _budget_is_tokens_or_share(cls, budget: int | float) -> int | float:
        if isinstance(budget, float) and not 0 < budget < 1:
            raise ValueError("give a whole number of tokens per KV head, or a share between 0 and 1")
        return budget

    @field_validator("protect")
    @classmethod
    def _spans_rise(cls, protect: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if not all(0 <= start < end for start, end in protect):
            raise ValueError("a span is [start, end) with 0 <= start < end")
        return protect

    @model_validator(mode="after")
    def _policy_takes_parameters(self) -> Evict:
        self.make_policy()
        return self

    def make_policy(self) -> Policy:
        """The policy with its parameters."""
        return make(self.policy, self.parameters)


class HeadPlan(PlanModel):
    """Specs of one KV head that differ from its layer's; what is left out is the layer's."""

    key: TensorSpec | None = None
    value: TensorSpec | None = None


class LayerPlan(PlanModel):
    """What a layer, or each layer of a range, stores.

    Attributes:
        layers: A layer index, or ranges such as ``"0-3"`` or ``"0-3,7"``.
        key: Format of the keys.
        value: Format of the values.
        window: Exact tokens.
        evict: Which tokens to keep; None for every token.
        heads: KV head index -> specs of that head.
    """

    layers: int | str
    key: TensorSpec
    value: TensorSpec
    window: Window = Window()
    evict: Evict | None = None
    heads: dict[int, HeadPlan] = Field(default_factory=dict)

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, layers: int | str) -> int | str:
        parse_layers(layers)
        return layers

    @property
    def indices(self) -> tuple[int, ...]:
        """Layer indices the entry covers, in the order written."""
        return parse_layers(self.layers)

    def head(self, index: int) -> tuple[TensorSpec, TensorSpec]:
        """Key and value specs of KV head ``index``."""
        own = self.heads.get(index, HeadPlan())
        return own.key or self.key, own.value or self.value


def parse_layers(layers: int | str) -> tuple[int, ...]:
    """Indices named by ``5``, ``"0-3"`` or ``"0-3,7"``.

    Raises:
        ValueError: The text is not a list of indices and rising ranges, or names a layer that no model has.
    """
    parts = [part.strip().split("-") for part in str(layers).split(",")]
    try:
        spans = [(int(p[0]), int(p[-1])) for p in parts if len(p) <= 2]
    except ValueError:
        spans = []
    if len(spans) != len(parts) or any(first > last for first, last in spans):
        raise ValueError(f"layers {layers!r} is neither an index nor ranges such as '0-3' or '0-3,7'")
    if any(last >= _MOST_LAYERS for _, last in spans):
        raise ValueError(f"layers {layers!r} names a layer from {_MOST_LAYERS} on, which no model has: lower it")
    return tuple(i for first, last in spans for i in range(first, last + 1))


def format_layers(indices: list[int]) -> int | str:
    """Shortest text that `parse_layers` reads back as ``indices`` (rising)."""
    spans: list[list[int]] = []
    for i in indices:
        if spans and spans[-1][1] == i - 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    if len(spans) == 1 and spans[0][0] == spans[0][1]:
        return spans[0][0]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
