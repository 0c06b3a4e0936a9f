"""KVmix's own rule: more bits for the layers whose projections have the largest gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.errors import DataError, PlanError
from kvloom.plan import GroupSize, Plan, Prefill, Provenance, TensorSpec, Window
from kvloom.signals import Profile

Bits = Literal[2, 3, 4]


@register
class KVmix(Allocator):
    """The rule of KVmix (arXiv 2506.08018; `classify_layers` and `set_quant_bits` of its code).

    Keys and values are ranked apart, by gradient norm. The first int(0.1 L) "important" and the
    next int(0.1 L) "general" layers of L get 3-bit keys and 4-bit values, all others 2 bits: of 32
    layers six, which is the paper's K 2.19 / V 2.38. The rule knows no budget. Its formats are
    kvloom's (3 bits are 3, not KVmix's eleven codes in 32 bits), and its shrinking window of
    recent tokens is not part of it: pass `window` for one.

    Args:
        key_group_size: tokens that share a key scale (`per_channel`).
        value_group_size: channels that share a value scale (`per_token`).
    """

    name = "kvmix"

    def __init__(self, key_group_size: GroupSize = 64, value_group_size: GroupSize = "head_dim") -> None:
        self._key_group_size = key_group_size
        self._value_group_size = value_group_size

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Applies the rule to the profile's gradient norms.

        Raises:
            PlanError: a budget was given, which the rule cannot honour, or the profile has no
                gradient norms.
        """
        if budget is not None:
            raise PlanError("budget must be None for method 'kvmix': its rule fixes the bits")
        gradient = profile.gradient
        if gradient is None:
            raise PlanError(
                f"the profile of signal {profile.table.signal!r} has no gradient norms for method 'kvmix': profile "
                "with signal gradient_norm or error_gradient"
            )
        key_high, value_high = _high(gradient.key), _high(gradient.value)
        specs = {
            layer: (
                self._key(3 if row in key_high else 2),
                self._value(4 if row in value_high else 2),
            )
            for row, layer in enumerate(profile.model.packed_layers)
        }
        return Plan.from_specs(
            profile.model,
            specs,
            window=window,
            prefill=prefill,
            provenance=Provenance(
                signal="gradient_norm",
                solver="kvmix (fixed rule, takes no budget)",
                calibration=profile.calibration.model_dump(),
                predicted_loss=_predicted(profile, specs),
            ),
        )

    def _key(self, bits: Bits) -> TensorSpec:
        return TensorSpec(bits=bits, grouping="per_channel", group_size=self._key_group_size)

    def _value(self, bits: Bits) -> TensorSpec:
        return TensorSpec(bits=bits, grouping="per_token", group_size=self._value_group_size)


def _high(norms: Sequence[float]) -> frozenset[int]:
    """Rows of the important and the general layers; equal norms rank by layer."""
    share = int(0.1 * len(norms))
    ranked = sorted(range(len(norms)), key=lambda row: -norms[row])
    return frozenset(ranked[: 2 * share])


def _predicted(profile: Profile, specs: dict[int, tuple[TensorSpec, TensorSpec]]) -> float | None:
    """The loss table's opinion of the plan, if it knows these formats."""
    try:
        return profile.table.predicted_loss(specs)
    except DataError:
        return None
