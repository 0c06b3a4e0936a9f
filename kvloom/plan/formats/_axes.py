"""Axes, groups and residuals of foreign quantisers in kvloom's words.

"axis" means three different things for a cache ``[batch, heads, tokens, channels]``:

- KVTuner's own quantiser ("vanilla", `vanilla_quantizer.py`): 0 groups channels of one token, 1 tokens of one channel.
- optimum-quanto (`tensor/grouped.py`): 0 groups channels of one token, -1 tokens of one channel; 1 is an error.
- HQQ (`hqq/core/quantize.py`): 1 groups channels of one token; 0 reshapes the flat tensor to ``[group, -1]``, so that a
  group is elements N/group apart, of several heads and tokens: never per channel.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from kvloom.errors import PlanError
from kvloom.pages import GROUP_SIZES, Grouping
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._spec import GroupSize, Window
from kvloom.plan.formats._deviations import Deviations

Backend = Literal["vanilla", "quanto", "hqq"]

_AXES: dict[Backend, dict[int, Grouping]] = {
    "vanilla": {0: "per_token", 1: "per_channel"},
    "quanto": {0: "per_token", -1: "per_channel"},
    "hqq": {1: "per_token"},
}
_REMEDIES: dict[Backend, str] = {
    "vanilla": "0 groups channels of a token, 1 tokens of a channel",
    "quanto": "0 groups channels of a token, -1 tokens of a channel, and quanto itself rejects others",
    "hqq": "1 groups channels of a token; 0 strides over heads and tokens, which no plan says, nor is it per channel",
}
# hqq: Quantizer.SUPPORTED_BITS without 1.58, and what KVTuner admits; quanto: its 8 bits know no groups.
_BITS: dict[Backend, tuple[int, ...]] = {
    "vanilla": (1, 2, 3, 4, 5, 6, 8),
    "quanto": (2, 4),
    "hqq": (1, 2, 3, 4, 5, 6, 8),
}


_COARSE = 2


def grouping_of(backend: Backend, axis: int, field: str) -> Grouping:
    """What ``axis`` of ``backend`` groups.

    Raises:
        PlanError: Nothing a plan can say.
    """
    axes = _AXES[backend]
    if axis not in axes:
        raise PlanError(f"{field} is {axis} and the backend is {backend}: {_REMEDIES[backend]}.")
    return axes[axis]


def axis_of(backend: Backend, grouping: Grouping, field: str) -> int:
    """The backend's axis of a grouping.

    Raises:
        PlanError: It has none.
    """
    for axis, name in _AXES[backend].items():
        if name == grouping:
            return axis
    raise PlanError(f"{field} is {grouping} and the backend is {backend}: {_REMEDIES[backend]}.")


def check_bits(backend: Backend, bits: float, field: str) -> int:
    """``bits`` as an integer width.

    Raises:
        PlanError: The backend or kvloom has no such width.
    """
    if bits not in _BITS[backend]:
        raise PlanError(f"{field} is {bits:g}: choose one of {_BITS[backend]} for backend {backend}.")
    return int(bits)


def group_size_of(size: int, grouping: Grouping, model: Fingerprint, field: str) -> GroupSize:
    """``size`` elements as a plan says it; -1 is a token's whole head.

    Raises:
        PlanError: The pages have no such group.
    """
    if size == -1 and grouping == "per_channel":
        raise PlanError(
            f"{field} -1 is a token's whole head, and per-channel groups span tokens: give a number of them."
        )
    if grouping == "per_token" and size != -1 and (size <= 0 or model.head_dim % size):
        raise PlanError(f"{field} {size} does not divide head_dim {model.head_dim}: choose a divisor.")
    if size in GROUP_SIZES:
        return cast(GroupSize, size)
    if grouping == "per_token" and size in (-1, model.head_dim):
        return "head_dim"
    raise PlanError(f"{field} is {size}: choose one of {GROUP_SIZES}.")


def residual_window(length: int, deviations: Deviations) -> Window:
    """Window for a residual as transformers' `QuantizedCache` has it, which fills up and is flushed whole."""
    if length:
        deviations.note(
            f"residual_length {length} there keeps 0 to {length} of the newest tokens exact and quantises the whole "
            f"cache again at each flush; a plan keeps at least {length} and quantises once"
        )
    return Window(recent=length)


def run_settings(given: dict[str, Any], model: Fingerprint, deviations: Deviations) -> None:
    """State that a ``device``, and a ``compute_dtype`` other than the model's, are not a plan's to set."""
    dtype, device = given.get("compute_dtype"), given.get("device")
    if dtype is not None and str(dtype).removeprefix("torch.") != model.dtype:
        deviations.note(f"compute_dtype {dtype} is not the plan's to set: what stays exact is in the model's own dtype")
    if device is not None:
        deviations.note(f"device {device} is not the plan's to set: a cache lives where its model runs")


def codec_of(backend: Backend, bits: int, grouping: Grouping, deviations: Deviations) -> str:
    """The codec that has the backend's grid, or one that errs no more (``benchmarks/AUTHORS.md``)."""
    if backend == "hqq":
        return "hqq"
    if backend == "vanilla" and grouping == "per_token" and bits <= _COARSE:
        clipped_note(deviations)
        return "clipped"
    return "affine"


def clipped_note(deviations: Deviations) -> None:
    """State why the coarsest sides of KVTuner's quantiser have another codec than the others."""
    deviations.note(
        f"KVTuner's grids have a level at zero, which at {_COARSE} bits a token and below errs less than the affine "
        "codec's grid: such sides are of codec clipped, which errs less than both"
    )


def symmetric_note(deviations: Deviations) -> None:
    """State where KVTuner's symmetric grid (`quant_sym`) differs from the affine codec's."""
    deviations.note(
        "asym false there has a level at zero and leaves one code unused; the affine codec's symmetric levels "
        "straddle zero"
    )
