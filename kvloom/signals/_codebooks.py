"""Codebooks for KVQuant's codec, calibrated on what matters: sensitivity-weighted k-means.

Source: KVQuant (Hooper et al., arXiv 2401.18079, section 3.3). The points of a layer's keys, or of its values, minimise
the Fisher-weighted squared error of calibration data, ``sum F_i (x_i - x_hat_i)^2`` with the diagonal of the empirical
Fisher information ``F_i = (dL / dx_i)^2``, ``L`` the cross entropy of the true next tokens. Elements are normalised by
the codec, ``x = scale * u + zero``, so that the sum is ``sum (scale_i dL / dx_i)^2 (u_i - point)^2``: k-means over
``u``, weighted with the squared gradient by ``u``. (The authors' script weights ``u`` with ``F_i`` alone.)

Codes see what pages hold, and so does calibration: keys before RoPE where the format says so, elements turned by its
rotation, outliers not at all.

``u`` is counted in fine bins, each with its weight and weighted mean, so that memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.cache import Rope, rope_of
from kvloom.codecs import NUQ, dual, dual_of, group, rotated, signs, split
from kvloom.errors import DataError, PlanError
from kvloom.pages import PAGE_TOKENS, Codebook, Format, num_outliers
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, Provenance, TensorSpec, Window, head_layouts
from kvloom.signals._base import SIDES, Side
from kvloom.signals._compute import Progress, silent
from kvloom.signals._kmeans import weighted_kmeans
from kvloom.signals._measure import at_rest, check_seen, logit_gradient, logits_of, packed_slice
from kvloom.signals._projections import find_projections, projected
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, Tapped, tapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BINS = 1 << 14
"""Of the normalised range [-1, 1]: a quarter of fp16's step at its ends."""


def calibrate_codebooks(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    texts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Plan:
    """The plan with a codebook for the keys and the values of every layer whose codec needs one.

    A prompt costs one forward and one backward pass. Codebooks that the plan has already are replaced.

    Args:
        model: The plan's model, whose attention goes through transformers' attention interface.
        plan: Keys or values have codec ``nuq``.
        tokens: Calibration prompts, integers `[prompts, tokens]`. Take them from other texts than those a plan is
            evaluated on.
        attention_mask: `[prompts, tokens]`, 0 where a prompt is padded.
        texts: Names of the texts the prompts come from, for the record.
        progress: Called after each prompt.

    Returns:
        A plan that says what was read under ``provenance.calibration["codebooks"]``.

    Raises:
        DataError: A prompt has nothing to score, is too short to fill a page, or gives no finite loss; or no gradient
            reaches the keys or the values of a layer.
        ModelError: The model is not the plan's, its attention cannot be measured, or its rotary embedding, which the
            plan needs, cannot be taken back.
        PlanError: No codec of the plan needs a codebook.
    """
    plan.model.check(Fingerprint.of(model))
    prompts = Prompts.of(model, tokens, attention_mask, seed=0)
    rope = rope_of(model, plan.pre_rope_layers) if plan.pre_rope_layers else None
    units = list(_units(plan, prompts.tokens.shape[1], rope))
    if not units:
        raise PlanError("the plan needs no codebooks: give the keys or the values of some layer codec 'nuq'.")
    report = progress or silent
    for prompt in range(len(prompts)):
        report(prompt, len(prompts), "reading prompts")
        for layer, attention in _attention(model, plan.model, prompts.batch(prompt, 1)).items():
            _count(attention, [unit for unit in units if unit.layer == layer])
    report(len(prompts), len(prompts), "reading prompts")
    found = {(unit.layer, unit.side, unit.spec): unit.codebook() for unit in units}
    record = {"sha256": prompts.sha256, "texts": list(texts), "prompts": len(prompts), "tokens": tokens.shape[1]}
    provenance = plan.provenance or Provenance()
    calibration = {**(provenance.calibration or {}), "codebooks": record}
    return Plan(
        model=plan.model,
        layers=tuple(entry for old in plan.layers for entry in _filled(old, found)),
        prefill=plan.prefill,
        tensors=plan.tensors,
        provenance=provenance.model_copy(update={"calibration": calibration}),
    )


@dataclass
class _Unit:
    """The heads of a layer that share a codebook, and what was counted of them.

    Attributes:
        layer: Index of the layer.
        side: Keys or values.
        spec: As the plan has it.
        fmt: Its format.
        heads: KV heads.
        packed: Tokens of a prompt that pages would hold.
        page_tokens: Tokens of a page.
        rope: What keys are taken back by first, if the format has them before RoPE.
        turn: Matrices of these heads that states and gradients are multiplied with, ``[heads, head_dim, head_dim]``
            each, if the format turns them.
        weight: Weight of the elements of each bin, float64.
        moment: Sum of weight times normalised element, likewise.
    """

    layer: int
    side: Side
    spec: TensorSpec
    fmt: Format
    heads: list[int]
    packed: slice
    page_tokens: int
    rope: Rope | None
    turn: tuple[Tensor, Tensor] | None
    weight: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))
    moment: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))

    def add(self, states: Tensor, gradient: Tensor) -> None:
        """Count keys or values `[batch, kv_heads, tokens, head_dim]` and the gradient by them."""
        own, slope = self._as_packed(*(x[:, self.heads, self.packed].float() for x in (states, gradient)))
        unit, scale = NUQ.normalise(own, self.fmt)
        unit = unit.double().flatten().cpu()
        weight = (group(slope, self.fmt) * scale).double().square().flatten().cpu()
        bins = ((unit + 1) * (_BINS / 2)).long().clamp_(max=_BINS - 1)
        self.weight += torch.bincount(bins, weight, _BINS)
        self.moment += torch.bincount(bins, weight * unit, _BINS)

    def _as_packed(self, own: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """What codes stand for of keys or values ``[batch, heads, tokens, head_dim]``, and the gradient by it."""
        if self.rope is not None:
            own, slope = (self.rope.before(x, self.packed.start) for x in (own, slope))
        if self.turn is not None:
            own, slope = (x @ matrix.to(x) for x, matrix in zip((own, slope), self.turn, strict=True))
        if count := num_outliers(self.fmt, own.shape[-1], self.page_tokens):
            own, slope = (x.unflatten(-2, (-1, self.page_tokens)) for x in (own, slope))
            own, outliers = split(own, self.fmt, count)
            slope = slope.flatten(-2).scatter(-1, outliers.index, 0.0).view_as(own)
        return own, slope

    def codebook(self) -> Codebook:
        """The points of the least weighted squared error."""
        some = self.weight > 0
        if not bool(some.any()):
            raise DataError(
                f"no gradient reaches the {self.side}s of layer {self.layer}, so their codebook cannot be calibrated; "
                "give other prompts."
            )
        numbers = self.moment[some] / self.weight[some]
        points = weighted_kmeans(numbers, self.weight[some], 2**self.fmt.bits)
        return tuple(points.half().tolist())


def _units(plan: Plan, tokens: int, rope: Rope | None) -> Iterator[_Unit]:
    """What needs a codebook, layer by layer."""
    heads, dim = plan.model.num_kv_heads, plan.model.head_dim
    for entry in plan.layers:
        page_tokens = head_layouts(entry, heads, dim, 2)[0].page_tokens
        for n, side in enumerate(SIDES):
            specs = [entry.head(head)[n] for head in range(heads)]
            for spec in dict.fromkeys(spec for spec in specs if spec.is_calibrated):
                own = [head for head in range(heads) if specs[head] == spec]
                packed = packed_slice(tokens, entry.window, page_tokens)
                for layer in entry.indices:
                    before, turn = rope if spec.pre_rope else None, _turn(plan, layer, side, spec, own)
                    yield _Unit(layer, side, spec, spec.format(dim), own, packed, page_tokens, before, turn)


def _turn(plan: Plan, layer: int, side: Side, spec: TensorSpec, heads: list[int]) -> tuple[Tensor, Tensor] | None:
    """What turns states, and what turns their readers and gradients."""
    if spec.rotation is None:
        return None
    dim = plan.model.head_dim
    if spec.rotation == "calibrated":
        forward = plan.rotations()[layer][side][heads]
        return forward, dual_of(forward)
    return rotated(torch.eye(dim), signs(spec.rotation, dim)), dual(spec.rotation, dim)


def _count(attention: Tapped, units: Sequence[_Unit]) -> None:
    if not units:
        return
    gradients = dict(zip(SIDES, attention.state_gradients(), strict=True))
    for unit in units:
        unit.add(attention.key if unit.side == "key" else attention.value, gradients[unit.side])


def _attention(model: PreTrainedModel, fingerprint: Fingerprint, prompts: Prompts) -> dict[int, Tapped]:
    """Attention of every packed layer, after a backward pass from the true next tokens."""
    width = fingerprint.num_kv_heads * fingerprint.head_dim
    projections = find_projections(model.get_decoder(), fingerprint.packed_layers, width)
    tap = Tap(fingerprint.packed_layers, Window(), PAGE_TOKENS)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        at_rest(model),
        tapped(model, tap),
        projected(projections.values()) as kept,
    ):
        logits = logits_of(model, prompts)
        check_seen(model, tap)
        start = logit_gradient(prompts, "true", logits)
        torch.autograd.grad(logits, list(kept.outputs.values()), start)
    return tap.caught


def _filled(entry: LayerPlan, found: dict[tuple[int, Side, TensorSpec], Codebook]) -> Iterator[LayerPlan]:
    """An entry with its codebooks: one for each of its layers, unless it needs none."""
    specs = [entry.key, entry.value]
    specs += [spec for head in entry.heads.values() for spec in (head.key, head.value) if spec is not None]
    if not any(spec.is_calibrated for spec in specs):
        yield entry
        return
    for layer in entry.indices:
        fill = partial(_with_codebook, found, layer)
        heads = {
            head: HeadPlan(key=fill("key", own.key), value=fill("value", own.value))
            for head, own in entry.heads.items()
        }
        changed = {"layers": layer, "key": fill("key", entry.key), "value": fill("value", entry.value), "heads": heads}
        yield entry.model_copy(update=changed)


def _with_codebook(
    found: dict[tuple[int, Side, TensorSpec], Codebook], layer: int, side: Side, spec: TensorSpec | None
) -> TensorSpec | None:
    """The spec as it is where nothing was found for it: it needs no codebook, or every head has another spec."""
    if spec is None or (layer, side, spec) not in found:
        return spec
    return spec.model_copy(update={"codebook": found[layer, side, spec]})
