"""How one tensor of a layer (its keys or its values) is stored: the smallest fact every room shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvloom.errors import PlanError
from kvloom.pages._codebook import POINT_BYTES, Codebook
from kvloom.pages._codec_facts import Form, codec_facts

Grouping = Literal["per_channel", "per_token"]
Role = Literal["key", "value"]
Rotation = Literal["hadamard", "calibrated"]

BITS = (1, 2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (16, 32, 64, 128, 256)
PASSTHROUGH_BITS = 16
PAGE_TOKENS = 64
HEAD_DIM_STEP = 16

# A code of b bits is stored as planes of power-of-two width, low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2.
_PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    8: (8,),
    16: (),
}


@dataclass(frozen=True)
class Format:
    """Number format of one side (keys or values) of a page, with every size resolved.

    Attributes:
        bits: Code width; 16 is a passthrough in the compute dtype.
        grouping: ``per_channel``: a group is ``group_size`` consecutive tokens of one channel;
            ``per_token``: ``group_size`` consecutive channels of one token.
        group_size: Elements that share a scale.
        symmetric: The grid is centred on zero and no zero point is stored.
        codec: Name of the number format in the codecs room.
        rotation: How the elements were turned before they were quantised; no business of those who read pages.
        codebook: The calibrated points of a codec that has none of its own; `points` is what codes stand for.
        outliers: Share of the elements of a page that are kept in fp16 beside the codes.
        pre_rope: Keys are packed as they were before their rotary embedding; who decodes pages applies it again.
    """

    bits: int
    grouping: Grouping
    group_size: int
    symmetric: bool = False
    codec: str = "affine"
    rotation: Rotation | None = None
    codebook: Codebook | None = None
    outliers: float = 0.0
    pre_rope: bool = False

    @property
    def is_passthrough(self) -> bool:
        """Whether elements are kept as they come, in the compute dtype."""
        return self.bits == PASSTHROUGH_BITS

    @property
    def form(self) -> Form:
        """How a page becomes values; see `CodecFacts`. A passthrough has no codes and hinders no kernel."""
        if self.is_passthrough:
            return "affine"
        return "opaque" if self.outliers or self.pre_rope else codec_facts(self.codec).form

    @property
    def is_calibrated(self) -> bool:
        """Whether the plan is to bring the codebook."""
        return not self.is_passthrough and codec_facts(self.codec).is_calibrated

    @property
    def codebook_nbytes(self) -> int:
        """Bytes of the codebook that a layer keeps beside its pages, if it is calibrated."""
        return 2**self.bits * POINT_BYTES if self.is_calibrated else 0

    @property
    def points(self) -> Codebook:
        """What codes of a codec of ``codebook`` form stand for, in units of the scale; empty for other codecs.

        Raises:
            PlanError: The codec needs a calibrated codebook and the plan brought none.
        """
        if not self._has_points:
            return ()
        return codec_facts(self.codec).points(self.codec, self.bits, self.codebook)

    @property
    def symmetric_zero(self) -> float:
        """What code 0 stands for besides its point, in units of the scale, where no zero point is stored."""
        return 0.0 if self._has_points else -0.5 * self.levels

    @property
    def _has_points(self) -> bool:
        return not self.is_passthrough and codec_facts(self.codec).form == "codebook"

    @property
    def levels(self) -> int:
        """Largest code, ``2**bits - 1``."""
        return int(2**self.bits) - 1

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the stored bit planes, low bits first; they add up to ``bits``."""
        return _PLANES[self.bits]

    @property
    def num_params(self) -> int:
        """fp16 numbers stored per group: scale, and the zero point unless symmetric."""
        if self.is_passthrough:
            return 0
        return 1 if self.symmetric else 2


def page_tokens_of(*formats: Format) -> int:
    """Tokens in a page that holds these formats: 64, or the largest ``per_channel`` group.

    Source: ``page-format.md``, "Layout": a page is 64 tokens, or the keys' token-group size if that is larger.
    """
    spans = (f.group_size for f in formats if f.grouping == "per_channel" and not f.is_passthrough)
    return max([PAGE_TOKENS, *spans])


def check_format(fmt: Format, head_dim: int, role: Role) -> None:
    """Raise PlanError if ``fmt`` cannot be laid out for ``head_dim``, or is not for its codec or its side."""
    if head_dim % HEAD_DIM_STEP or head_dim <= 0:
        raise PlanError(
            f"head_dim {head_dim} is not a positive multiple of {HEAD_DIM_STEP}, the width of a tensor-core tile; "
            "kvloom cannot pack this model's cache."
        )
    if fmt.is_passthrough:
        return
    facts = codec_facts(fmt.codec)
    facts.check(fmt.codec, fmt.bits, fmt.symmetric)
    facts.check_codebook(fmt.codec, fmt.bits, fmt.codebook)
    facts.check_group(fmt.codec, fmt.grouping, fmt.group_size)
    facts.check_outliers(fmt.codec, fmt.outliers)
    if fmt.pre_rope and role == "value":
        raise PlanError("value.pre_rope is true and values have no rotary embedding: set it for keys alone.")
    if fmt.grouping == "per_token" and head_dim % fmt.group_size:
        raise PlanError(
            f"group_size {fmt.group_size} does not divide head_dim {head_dim}; "
            'per_token groups are consecutive channels of one token: choose a divisor or "head_dim".'
        )
    if fmt.grouping == "per_channel" and fmt.group_size not in (*GROUP_SIZES, facts.group_size):
        raise PlanError(
            f"group_size {fmt.group_size} is not one of {GROUP_SIZES}, the token counts a per_channel group may span."
        )
