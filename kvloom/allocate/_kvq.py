"""KVQ's rules: bits, and group sizes, go to the tensors of the largest norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._ladder import Ladder, ladder
from kvloom.allocate._problem import Problem
from kvloom.allocate._units import picks_of, side_losses
from kvloom.errors import PlanError
from kvloom.plan import GroupSize, Plan, Prefill, TensorSpec, Window, spend_bits, spend_groups
from kvloom.signals import LossTable, Profile

_LEAST_NORM = 1e-12


@register
class KVQ(Allocator):
    """The greedy rules of KVQ (arXiv 2502.15075; `bit_pattern.py` and `group_pattern.py` of mohsenhariri/spectral-kv).

    Tensors K0, V0, K1, V1, ... of norm c start at the smallest width, and the one whose next width saves most of its
    error ``c**2 * 4**-bits`` a bit gets it, as long as the budget allows (`kvloom.plan.spend_bits`). Group sizes come
    from norms too if asked for (`kvloom.plan.spend_groups`). What is done otherwise: the budget is in true bytes, so
    that the rule gets the largest total of bits whose plan fits; formats are the profile's, the longest row of widths
    that keys and values share (KVQ's are per token, of `hqq`); 1.58 and 3.5 bits are not on offer.

    Args:
        norms: norms of the key and value projections, ``[K0, V0, K1, V1, ...]``, such as KVQ ships. By default those
            that the loss table implies: ``c**2`` is the loss at the smallest width b, times ``4**b``. Of a table that
            KVQ's own signal predicted these are its norms.
        group_budget: the group size that, in all tensors, would make as many groups as they may have together; None
            keeps the group size of the longest row of widths.
    """

    name = "kvq"

    def __init__(self, norms: Sequence[float] | None = None, group_budget: float | None = None) -> None:
        self._norms = norms
        self._group_budget = group_budget

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Applies the rule to the largest total of bits whose plan fits into the budget.

        Raises:
            PlanError: there is no budget, keys and values share no widths, the norms are not two a layer, or not even
                the smallest width fits into the budget.
        """
        problem = Problem.of(profile, budget, window, prefill, self.name)
        norms = self._norms_of(profile.table)
        ladders = self._ladders(profile.table, norms)
        widths = _shared(ladders)

        def picks(bits: int) -> tuple[int, ...]:
            chosen = [own[int(width)] for own, width in zip(ladders, spend_bits(norms, bits, widths), strict=True)]
            pairs = zip(chosen[::2], chosen[1::2], strict=True)
            return picks_of(problem.units, dict(zip(profile.table.layers, pairs, strict=True)))

        least, most = len(norms) * widths[0], len(norms) * widths[-1]
        if (smallest := problem.nbytes(picks(least))) > problem.capacity:
            raise PlanError(problem.too_small(smallest, f"{widths[0]} bits everywhere"))
        while least < most:  # the most bits whose plan fits
            middle = (least + most + 1) // 2
            fits = problem.nbytes(picks(middle)) <= problem.capacity
            least, most = (middle, most) if fits else (least, middle - 1)
        return problem.plan(picks(least), self.name)

    def _norms_of(self, table: LossTable) -> list[float]:
        """A norm for each tensor, keys and values in turn."""
        if self._norms is not None:
            if len(self._norms) != 2 * len(table.layers):
                raise PlanError(
                    f"norms has {len(self._norms)} numbers: give two for each of {len(table.layers)} layers, "
                    "[K0, V0, K1, V1, ...]"
                )
            return list(self._norms)
        sides = (table.key_specs, table.value_specs)
        bits = _shared([ladder(specs) for specs in sides])[0]
        columns = [specs.index(ladder(specs)[bits]) for specs in sides]
        return [
            max(math.sqrt(max(losses[column], 0.0) * 4**bits), _LEAST_NORM)
            for losses_of in side_losses(table).values()
            for losses, column in zip(losses_of, columns, strict=True)
        ]

    def _ladders(self, table: LossTable, norms: Sequence[float]) -> list[Ladder]:
        """The formats that each tensor may have, keys and values in turn."""
        sides = (table.key_specs, table.value_specs)
        if self._group_budget is None:
            return [ladder(specs) for _ in table.layers for specs in sides]
        sized = [_sized(specs, table.model.head_dim) for specs in sides]
        sizes = sorted(set(sized[0]) & set(sized[1]))
        if not sizes:
            raise PlanError("keys and values share no group size among their candidates: profile with more formats")
        groups = spend_groups(norms, self._group_budget, sizes)
        return [sized[n % 2][size] for n, size in enumerate(groups)]


def _shared(ladders: Sequence[Ladder]) -> list[int]:
    """Widths that all tensors may have, rising.

    Raises:
        PlanError: There are none.
    """
    widths = sorted(set.intersection(*(set(own) for own in ladders)))
    if not widths:
        raise PlanError("keys and values share no bits among their candidates: profile with more formats")
    return widths


def _sized(specs: Sequence[TensorSpec], head_dim: int) -> dict[int, Ladder]:
    """The longest ladder of each group size, in elements."""
    sizes: dict[int, GroupSize] = {}
    for spec in specs:
        sizes.setdefault(head_dim if spec.group_size == "head_dim" else spec.group_size, spec.group_size)
    return {size: ladder(specs, named) for size, named in sizes.items()}
