"""Calibrated rotations of a plan: what is cached, turned so that what reads it notices the storage error least.

Keys are read by queries (after rotary positions; with grouped queries by all heads of the group), values by the output
projection, whatever the text. A forward pass a prompt is all it takes; `kvloom.codecs.fitted` says what is made of the
moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from kvloom.codecs import fitted
from kvloom.errors import PlanError
from kvloom.pages import PAGE_TOKENS, PASSTHROUGH_BITS, Role
from kvloom.plan import (
    Fingerprint,
    HeadPlan,
    LayerPlan,
    Plan,
    PlanTensors,
    Provenance,
    TensorSpec,
    Window,
    head_layouts,
    rotation_name,
)
from kvloom.signals._compute import Progress, silent
from kvloom.signals._measure import at_rest, check_seen, packed_slice
from kvloom.signals._projections import output_moment
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, tapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LABEL = "reading prompts"
_MEAN_SHARE = 1e-3
"""Of a group's mean in a covariance: zero points carry the mean, but in fp16, and exact tokens in the compute dtype."""


@torch.no_grad()
def calibrate_rotations(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    *,
    texts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Plan:
    """The plan with ``rotation: "calibrated"`` wherever it rounds (below 16 bits), and the matrices for it.

    The plan grows by its matrices, 6 bytes (10 in float64) an element, ``kv_heads * head_dim**2`` elements a side and
    layer: ``48 * head_dim / (batch * tokens)`` true bits more, which pays for long contexts and batches only. A budget
    the plan was made for does not know of them.

    Args:
        model: The model the plan is for; its attention goes through transformers' attention interface.
        plan: What to rotate; rotations it has are replaced. Keys packed before RoPE stay as they are.
        tokens: Calibration prompts, integers ``[prompts, tokens]``, about as long as the contexts to come: what queries
            look at changes with the distance. Take them from other texts than those the plan is evaluated on.
        texts: Names of the texts the prompts come from, for the record.
        progress: Called after each prompt.

    Raises:
        PlanError: The plan rounds nothing.
        ModelError: The plan is for another model, or the model's attention or output projection cannot be told.
        DataError: The prompts are too short to fill a page of every layer.
    """
    shape = Fingerprint.of(model)
    plan.model.check(shape)
    entries = {layer: _calibrated(plan.spec(layer)) for layer in plan.model.packed_layers}
    sides = [(layer, side) for layer, entry in entries.items() for side in _rotated_sides(entry, shape.num_kv_heads)]
    if not sides:
        raise PlanError(
            "every side of the plan has 16 bits, which round nothing, or keys before RoPE: there is nothing to rotate."
        )
    prompts = Prompts.of(model, tokens, None, 0)
    readers = {(layer, "value"): output_moment(model, layer, shape) for layer, side in sides if side == "value"}
    states, queries = _read(model, entries, shape, prompts, progress or silent)
    readers |= {(layer, "key"): moment for layer, moment in queries.items()}
    made = {rotation_name(layer, side): fitted(states[layer, side], readers[layer, side]) for layer, side in sides}
    record = {
        "sha256": prompts.sha256,
        "texts": list(texts),
        "prompts": len(prompts),
        "tokens": prompts.tokens.shape[1],
    }
    return Plan(
        model=plan.model,
        layers=tuple(_calibrated(entry) for entry in plan.layers),
        prefill=plan.prefill,
        tensors=PlanTensors.of(made),
        provenance=(plan.provenance or Provenance()).model_copy(update={"rotations": record}),
    )


def _calibrated(entry: LayerPlan) -> LayerPlan:
    heads = {
        head: HeadPlan(key=own.key and _rotated(own.key), value=own.value and _rotated(own.value))
        for head, own in entry.heads.items()
    }
    return entry.model_copy(update={"key": _rotated(entry.key), "value": _rotated(entry.value), "heads": heads})


def _rotated(spec: TensorSpec) -> TensorSpec:
    if spec.bits == PASSTHROUGH_BITS or spec.pre_rope:
        return spec
    return spec.model_copy(update={"rotation": "calibrated"})


def _rotated_sides(entry: LayerPlan, kv_heads: int) -> Iterator[Role]:
    """Sides of a layer on which some head is rotated."""
    for n, side in enumerate(get_args(Role)):
        if any(entry.head(head)[n].rotation for head in range(kv_heads)):
            yield side


def _read(
    model: PreTrainedModel, entries: Mapping[int, LayerPlan], shape: Fingerprint, prompts: Prompts, report: Progress
) -> tuple[dict[tuple[int, Role], Tensor], dict[int, Tensor]]:
    """Covariances of the states by layer and side, second moments of the queries by layer; one pass a prompt."""
    pages = {layer: _page_tokens(entry, shape) for layer, entry in entries.items()}
    packed = {n: packed_slice(prompts.tokens.shape[1], entries[n].window, pages[n]) for n in entries}
    states: dict[tuple[int, Role], Tensor] = {}
    queries: dict[int, Tensor] = {}
    for done, prompt in enumerate(prompts.tokens):
        report(done, len(prompts), _LABEL)
        tap = Tap(entries, Window(), PAGE_TOKENS)
        with at_rest(model), tapped(model, tap):
            model.get_decoder()(input_ids=prompt[None].to(model.device), use_cache=False)
        check_seen(model, tap)
        for layer, caught in tap.caught.items():
            zeros = torch.zeros((), dtype=torch.float64)
            queries[layer] = queries.get(layer, zeros) + moment(caught.query[0].flatten(1, 2)).cpu()
            each: tuple[tuple[Role, Tensor], ...] = (("key", caught.key), ("value", caught.value))
            for n, (side, cached) in enumerate(each):
                specs = [entries[layer].head(head)[n] for head in range(shape.num_kv_heads)]
                covariance = state_covariance(cached[0, :, packed[layer]], specs, pages[layer]).cpu()
                states[layer, side] = states.get((layer, side), zeros) + covariance
    report(len(prompts), len(prompts), _LABEL)
    return states, queries


def _page_tokens(entry: LayerPlan, shape: Fingerprint) -> int:
    return head_layouts(entry, shape.num_kv_heads, shape.head_dim, 2)[0].page_tokens


def moment(x: Tensor) -> Tensor:
    """Sum of outer products, float64 ``[..., head_dim, head_dim]``, of ``x [..., n, head_dim]``."""
    wide = x.double()
    return wide.mT @ wide


def state_covariance(states: Tensor, specs: Sequence[TensorSpec], page_tokens: int) -> Tensor:
    """What of the states is rounded: their variation within the groups that share a zero point.

    Args:
        states: Keys or values ``[kv_heads, tokens, head_dim]``, whole pages.
        specs: Format of each head. ``per_channel`` groups carry their channel's mean in the zero point; of it a
            thousandth counts. In ``per_token`` groups everything counts.
        page_tokens: Tokens of a page, on which groups start anew (the last one may be shorter).

    Returns:
        float64 ``[kv_heads, head_dim, head_dim]``.
    """
    sums = []
    for head, spec in zip(states.double(), specs, strict=True):
        whole = moment(head)
        if spec.grouping == "per_channel":
            groups = head.unflatten(0, (-1, page_tokens)).split(int(spec.group_size), dim=1)
            within = torch.cat([group - group.mean(1, keepdim=True) for group in groups], dim=1)
            whole = _MEAN_SHARE * whole + moment(within.flatten(0, 1))
        sums.append(whole)
    return torch.stack(sums)
