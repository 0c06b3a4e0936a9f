"""Compute dtypes by the words that people have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom.errors import PlanError

if TYPE_CHECKING:
    import torch

_WORDS = {
    "float16": ("fp16", "half"),
    "bfloat16": ("bf16",),
    "float32": ("fp32", "float"),
    "float64": ("fp64", "double"),
}


def dtype_name(dtype: object) -> str:
    """Torch's name of a compute dtype.

    Args:
        dtype: A torch dtype, its name, or another usual word for it, such as ``fp16`` or ``half``.

    Raises:
        PlanError: It is not a floating-point dtype a model computes in.
    """
    word = str(dtype).removeprefix("torch.").lower()
    for name, others in _WORDS.items():
        if word == name or word in others:
            return name
    raise PlanError(f"dtype {str(dtype)!r} is not known: give one of {', '.join(_WORDS)}.")


def torch_dtype(dtype: object) -> torch.dtype:
    """A compute dtype by any word that `dtype_name` takes.

    Raises:
        PlanError: It is not a floating-point dtype a model computes in.
    """
    import torch

    found: torch.dtype = getattr(torch, dtype_name(dtype))
    return found
