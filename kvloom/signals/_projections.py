"""Where a model's keys and values come from: the linear maps that make them, and the one that reads values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvloom.errors import ModelError
from kvloom.signals._base import Side

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from kvloom.plan import Fingerprint

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class Projection:
    """Where one layer's keys and values come out of a linear map.

    Attributes:
        modules: The maps of keys and of values; the same module twice if they are fused.
        columns: Their columns of the maps' outputs.
    """

    modules: tuple[nn.Module, nn.Module]
    columns: tuple[slice, slice]

    def of(self, side: Side) -> tuple[nn.Module, slice]:
        """Module and columns of the keys or the values."""
        which = 0 if side == "key" else 1
        return self.modules[which], self.columns[which]


@dataclass
class Projected:
    """Inputs and outputs of the projections in one forward pass, `[batch, tokens, ...]` by module."""

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


def find_projections(model: nn.Module, layers: Collection[int], width: int) -> dict[int, Projection]:
    """Key and value projections of each layer.

    Known are separate `k_proj` and `v_proj`, and the fused `qkv_proj` whose output is queries, keys, values.

    Args:
        model: The decoder.
        layers: Layer indices.
        width: Columns of a layer's keys, `kv_heads * head_dim`.

    Raises:
        ModelError: A layer's projections cannot be told.
    """
    found: dict[int, Projection] = {}
    unknown: dict[int, str] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer not in layers:
            continue
        projection = _projection(module, width)
        if projection is not None:
            found[layer] = projection
        else:
            unknown[layer] = name
    for layer in layers:
        if layer not in found:
            raise ModelError(
                f"layer {layer} ({unknown.get(layer, type(model).__name__)}) has neither k_proj and v_proj nor "
                "qkv_proj, so the gradient by its key and value weights is unknown; choose another model."
            )
    return found


def _projection(attention: nn.Module, width: int) -> Projection | None:
    children = dict(attention.named_children())
    if "k_proj" in children and "v_proj" in children:
        return Projection((children["k_proj"], children["v_proj"]), (slice(None), slice(None)))
    if "qkv_proj" in children:
        fused = children["qkv_proj"]
        return Projection((fused, fused), (slice(-2 * width, -width), slice(-width, None)))
    return None


@contextmanager
def projected(projections: Collection[Projection]) -> Iterator[Projected]:
    """Keeps the projections' inputs and outputs; the graph of gradients begins at the first output."""
    kept = Projected()

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        kept.inputs[module], kept.outputs[module] = inputs[0].detach(), output

    handles: list[RemovableHandle] = []
    try:
        for module in {module: None for each in projections for module in each.modules}:
            handles.append(module.register_forward_hook(keep))
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def output_moment(model: PreTrainedModel, layer: int, shape: Fingerprint) -> Tensor:
    """Second moment of what the output projection makes of values, float64 ``[kv_heads, head_dim, head_dim]``.

    ``sum_h W_h^T W_h`` over the query heads ``h`` of a KV head's group, ``W_h`` their columns of the projection.

    Raises:
        ModelError: The attention has no linear map named like an output projection.
    """
    for module in model.get_decoder().modules():
        if getattr(module, "layer_idx", None) == layer:
            for name, child in module.named_children():
                if name in _OUTPUT_PROJECTIONS and isinstance(child, nn.Linear):
                    heads = child.weight.detach().double().unflatten(1, (shape.num_kv_heads, -1, shape.head_dim))
                    return torch.einsum("ohgi,ohgj->hij", heads, heads).cpu()
    raise ModelError(
        f"layer {layer} has no linear map named {' or '.join(_OUTPUT_PROJECTIONS)}, so what reads its values is "
        "unknown; leave its values unrotated or at 16 bits."
    )
