"""What a plan must keep to besides its budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvloom.errors import PlanError
from kvloom.plan import Fingerprint, parse_layers

_PAIR = re.compile(r"K(\d+)V(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Constraints:
    """Side constraints of the exact method; by default there are none.

    Attributes:
        equal_in: packed layers in a block whose keys all have the same bits, and whose values do; blocks start at the
            first packed layer, and the last one may be shorter. Where heads decide by themselves, each KV head has the
            bits of the head of its index in the other layers.
        pairs: the only (key bits, value bits) a layer (or KV head) may have; None allows all.
        max_layouts: at most so many different pairs of a key and a value format in the whole plan, over all layers and
            heads, hence page layouts.
        protect: layer index -> the least bits of its keys and of its values, in all heads.
    """

    equal_in: int = 1
    pairs: frozenset[tuple[int, int]] | None = None
    max_layouts: int | None = None
    protect: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("equal_in", "max_layouts"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise PlanError(f"{name} is {given}: give a number of at least 1")
        if self.pairs is not None and not self.pairs:
            raise PlanError("pairs is empty: allow at least one, such as K4V2")

    def __bool__(self) -> bool:
        return self != Constraints()

    def check(self, model: Fingerprint) -> None:
        """Refuses constraints that do not fit the model.

        Raises:
            PlanError: `protect` names a layer that the model does not pack.
        """
        if foreign := sorted(set(self.protect) - set(model.packed_layers)):
            raise PlanError(f"protect names layer {foreign[0]}, which is not one of the packed layers of the model")

    def __str__(self) -> str:
        said = {
            "equal_in": self.equal_in if self.equal_in > 1 else None,
            "pairs": self.pairs and ",".join(f"K{key}V{value}" for key, value in sorted(self.pairs)),
            "max_layouts": self.max_layouts,
            "protect": ",".join(f"{layer}:{bits}" for layer, bits in sorted(self.protect.items())),
        }
        return ", ".join(f"{name} {value}" for name, value in said.items() if value)


def parse_pairs(text: str) -> frozenset[tuple[int, int]]:
    """Reads pairs of key and value bits such as `K4V4,K4V2,K2V2`.

    Raises:
        PlanError: it is no list of pairs.
    """
    found = [_PAIR.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        raise PlanError(f"cannot read the pairs {text!r}: give bits of keys and values, such as K4V4,K4V2")
    return frozenset((int(match[1]), int(match[2])) for match in found if match)


def parse_protect(texts: Iterable[str]) -> dict[int, int]:
    """Reads layers and their least bits, each text such as `0-1,29:8`.

    Raises:
        PlanError: a text is not layers, a colon and bits, or two name the same layer.
    """
    protect: dict[int, int] = {}
    for text in texts:
        layers, _, bits = text.partition(":")
        try:
            own = dict.fromkeys(parse_layers(layers), int(bits))
        except ValueError:
            raise PlanError(f"cannot read {text!r}: give layers and their least bits, such as 0-1,29:8") from None
        if twice := sorted(own.keys() & protect.keys()):
            raise PlanError(f"layer {twice[0]} is protected twice: name it once")
        protect |= own
    return protect
