"""What plans and kernels need to know of a codec without loading it.

Plans are read without torch, so the facts of kvloom's own codecs are listed here; a codec of somebody else declares its
own when it is registered (`kvloom.codecs.register`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvloom._names import unknown
from kvloom.errors import PlanError
from kvloom.pages._codebook import NORMAL_CODEBOOKS, Codebook, in_fp16

Form = Literal["affine", "codebook", "opaque"]


@dataclass(frozen=True)
class CodecFacts:
    """What a codec stores, and in which formats.

    Attributes:
        form: ``affine``: an element decodes as ``scale * code + zero`` from the fp16 parameters of its group (``zero =
            -scale * levels / 2`` where the format is symmetric), so every kernel reads the pages. ``codebook``: as
            ``scale * point[code] + zero`` (no zero where the format is symmetric), at most 4 bits; likewise.
            ``opaque``: only the codec can decode, and attention reads pages that were decoded first.
        bits: Code widths it takes.
        symmetric: Whether it takes symmetric formats, without zero points.
        asymmetric: Whether it takes the others.
        codebooks: The points of a codec of ``codebook`` form, for each of ``bits``; none if plans bring their own,
            calibrated ones.
        group_size: Tokens of its groups, which are ``per_channel``, where it has a size of its own: the last group of a
            page holds what is left. None for any that a page is a multiple of.
    """

    form: Form = "affine"
    bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    symmetric: bool = True
    asymmetric: bool = True
    codebooks: tuple[Codebook, ...] = ()
    group_size: int | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether plans bring the codebooks."""
        return self.form == "codebook" and not self.codebooks

    @property
    def symmetries(self) -> tuple[bool, ...]:
        """What it takes for `Format.symmetric`."""
        return (False,) * self.asymmetric + (True,) * self.symmetric

    def check(self, name: str, bits: int, symmetric: bool) -> None:
        """Raise PlanError, in the name of the codec, if it does not take such a format."""
        self.check_bits(name, bits)
        self.check_symmetric(name, symmetric)

    def check_bits(self, name: str, bits: int) -> None:
        """Raise PlanError, in the name of the codec, if it does not take codes of this width."""
        if bits not in self.bits:
            raise PlanError(f"bits {bits} is not one of {self.bits}, the widths that codec {name!r} takes.")

    def check_symmetric(self, name: str, symmetric: bool) -> None:
        """Raise PlanError, in the name of the codec, if it stores a zero point and the format none, or contrariwise."""
        if symmetric and not self.symmetric:
            raise PlanError(f"symmetric is not for codec {name!r}, which always stores a zero point: leave it out.")
        if not symmetric and not self.asymmetric:
            raise PlanError(f"symmetric is false where codec {name!r} never stores a zero point: set it to true.")

    def check_codebook(self, name: str, bits: int, codebook: Codebook | None) -> None:
        """Raise PlanError, in the name of the codec, if a plan's codebook is not one for codes of this width."""
        if codebook is None:
            return
        if not self.is_calibrated:
            raise PlanError(f"codebook is not for codec {name!r}, which has its own grid: leave it out.")
        points = 2**bits
        if len(codebook) != points or list(codebook) != sorted(codebook) or not -1 <= codebook[0] <= codebook[-1] <= 1:
            raise PlanError(
                f"codebook needs {points} rising numbers between -1 and 1 for {bits} bits: leave it out and run "
                "`kvloom calibrate`."
            )

    def points(self, name: str, bits: int, codebook: Codebook | None) -> Codebook:
        """The codebook of a format, in fp16.

        Raises:
            PlanError: Plans bring the codebooks of this codec, and ``codebook`` is None.
        """
        if self.codebooks:
            codebook = self.codebooks[self.bits.index(bits)]
        if codebook is None:
            raise PlanError(f"codebook is missing, which codec {name!r} needs: run `kvloom calibrate` on the plan.")
        return in_fp16(codebook)

    def check_group(self, name: str, grouping: str, group_size: int | str) -> None:
        """Raise PlanError, in the name of the codec, if its groups have one size and this is another."""
        if self.group_size is not None and (grouping, group_size) != ("per_channel", self.group_size):
            raise PlanError(
                f"group_size {group_size} {grouping} is not for codec {name!r}, whose groups are {self.group_size} "
                f'tokens of a channel: set group_size to {self.group_size} and grouping to "per_channel".'
            )

    def check_outliers(self, name: str, outliers: float) -> None:
        """Raise PlanError, in the name of the codec, if outliers are asked of groups that a page is no multiple of."""
        if outliers and self.group_size is not None:
            raise PlanError(f"outliers are not for codec {name!r}, whose groups do not fill a page: leave them out.")


_FACTS: dict[str, CodecFacts] = {
    "affine": CodecFacts(),
    "clipped": CodecFacts(),
    "hqq": CodecFacts(symmetric=False),
    "kvmix3": CodecFacts(form="opaque", bits=(3,), symmetric=False, group_size=11),
    "lloyd": CodecFacts("codebook", bits=(1, 2, 3, 4), asymmetric=False, codebooks=NORMAL_CODEBOOKS),
    "nuq": CodecFacts("codebook", bits=(2, 3, 4), symmetric=False),
    "quanto": CodecFacts(bits=(2, 4), symmetric=False),
}


def codec_facts(name: str) -> CodecFacts:
    """The facts of a codec.

    Raises:
        PlanError: No codec has this name.
    """
    if name not in _FACTS:
        said = unknown("codec", name, sorted(_FACTS)).removesuffix(".")
        raise PlanError(f"{said}, or register your own before the plan is read.")
    return _FACTS[name]


def declare_codec(name: str, facts: CodecFacts | None) -> None:
    """Make a codec's facts known, or with None forget them."""
    if facts is None:
        _FACTS.pop(name, None)
    else:
        _FACTS[name] = facts
