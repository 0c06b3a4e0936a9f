"""Reads prompts with a model and lets signals score what the backward passes show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvloom.cache import rope_of
from kvloom.errors import DataError, ModelError, PlanError
from kvloom.pages import check_format, page_tokens_of
from kvloom.plan import Fingerprint, TensorSpec, Window
from kvloom.signals._base import SIDES, Evidence, Labels, LayerSignal, Scores, Side
from kvloom.signals._projections import Projected, find_projections, projected
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, packed_end, tapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 256
"""Rows of logits whose probabilities exist at a time."""


class Meter:
    """A model made ready to be measured with prompts of one length.

    Args:
        model: The model.
        shape: Its fingerprint.
        key_specs: Candidate formats of keys.
        value_specs: Candidate formats of values.
        window: Tokens the cache will keep exactly.
        tokens: Tokens in each prompt.

    Attributes:
        model: The model.
        shape: Its fingerprint.
        layers: Its packed layers.
        formats: Candidate formats of each side.
        window: Tokens the cache will keep exactly.
        page_tokens: Tokens in a page.
        packed: Tokens that the last query of a prompt sees packed.
        rope: The model's rotary embedding, if a format is for keys before it.
        projections: Where each layer's keys and values come out of a linear map.

    Raises:
        DataError: Prompts of this length never fill a page.
        ModelError: The key and value projections cannot be told, or a format is for keys before a rotary embedding that
            the model does not have.
        PlanError: A format does not fit the model's head_dim, its rotation is calibrated, or its codebook is missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: Fingerprint,
        key_specs: Sequence[TensorSpec],
        value_specs: Sequence[TensorSpec],
        window: Window,
        tokens: int,
    ) -> None:
        specs: dict[Side, Sequence[TensorSpec]] = {"key": key_specs, "value": value_specs}
        self.formats = {side: [spec.format(shape.head_dim) for spec in specs[side]] for side in SIDES}
        every = [fmt for formats in self.formats.values() for fmt in formats]
        for side, formats in self.formats.items():
            for fmt in formats:
                check_format(fmt, shape.head_dim, side)
                if fmt.rotation == "calibrated":
                    raise PlanError(
                        "rotation 'calibrated' is fitted to a plan, so a profile cannot predict it: use 'hadamard' "
                        "here, and kvloom calibrate --rotate on the plan."
                    )
                if fmt.is_calibrated and fmt.codebook is None:
                    raise PlanError(
                        f"codec {fmt.codec!r} has a codebook for every layer, which a profile cannot predict: "
                        f"measure 'clipped' here, name {fmt.codec!r} in the plan and run kvloom calibrate on it."
                    )
        self.page_tokens = page_tokens_of(*every)
        self.packed = packed_slice(tokens, window, self.page_tokens)
        self.model, self.shape, self.window = model, shape, window
        self.layers = shape.packed_layers
        self.rope = rope_of(model, self.layers) if any(fmt.pre_rope for fmt in every) else None
        width = shape.num_kv_heads * shape.head_dim
        self.projections = find_projections(model.get_decoder(), self.layers, width)

    def read(self, prompts: Prompts, signals: Mapping[Labels | None, Sequence[LayerSignal]]) -> dict[str, Scores]:
        """Scores one batch: a forward pass, and a backward pass for each kind of labels.

        Args:
            prompts: The batch.
            signals: What looks at the pass with these labels. Those under None look at a forward pass alone, and then
                there are no others.

        Returns:
            Scores by the signal's name.

        Raises:
            DataError: The model gives no finite probabilities.
            ModelError: The attention of a packed layer was not seen.
        """
        tap = Tap(self.layers, self.window, self.page_tokens)
        with torch.inference_mode(False), at_rest(self.model), tapped(self.model, tap):
            if None in signals:
                return self._read_forward(prompts, tap, signals[None])
            return self._read_backward(prompts, tap, {labels: some for labels, some in signals.items() if labels})

    @torch.no_grad()
    def _read_forward(self, prompts: Prompts, tap: Tap, signals: Sequence[LayerSignal]) -> dict[str, Scores]:
        self.model.get_decoder()(**inputs_of(self.model, prompts), use_cache=False)
        check_seen(self.model, tap)
        return {signal.name: self._scores(signal, prompts, tap, None, {}) for signal in signals}

    def _read_backward(
        self, prompts: Prompts, tap: Tap, signals: Mapping[Labels, Sequence[LayerSignal]]
    ) -> dict[str, Scores]:
        found = {}
        with torch.enable_grad(), projected(self.projections.values()) as kept:
            logits = logits_of(self.model, prompts)
            check_seen(self.model, tap)
            for i, (labels, wanted) in enumerate(signals.items(), start=1):
                start = logit_gradient(prompts, labels, logits)
                outputs = list(kept.outputs.values())
                gradients = torch.autograd.grad(logits, outputs, start, retain_graph=i < len(signals))
                del start
                by_module = dict(zip(kept.outputs, gradients, strict=True))
                with torch.no_grad():
                    for signal in wanted:
                        found[signal.name] = self._scores(signal, prompts, tap, kept, by_module)
        return found

    def _scores(
        self,
        signal: LayerSignal,
        prompts: Prompts,
        tap: Tap,
        kept: Projected | None,
        gradients: Mapping[nn.Module, Tensor],
    ) -> Scores:
        """Scores of one signal, layer by layer."""
        found: Scores = {}
        for side in SIDES:
            rows = []
            for layer in self.layers:
                module, columns = self.projections[layer].of(side)
                attention = tap.caught[layer]
                evidence = Evidence(
                    side=side,
                    layer=layer,
                    model=self.model,
                    shape=self.shape,
                    scored=prompts.scored.sum(dim=1).to(attention.key.device),
                    attention=attention,
                    packed=self.packed,
                    inputs=kept.inputs[module] if kept else None,
                    output_gradient=gradients[module][..., columns] if kept else None,
                    formats=self.formats[side],
                    rope=self.rope,
                )
                rows.append(signal.score(evidence))
            found[side] = torch.stack(rows, dim=1).float().cpu()
        return found


def check_seen(model: nn.Module, tap: Tap) -> None:
    """Raise ModelError if the attention of a layer was not caught."""
    missing = [layer for layer in tap.layers if layer not in tap.caught]
    if missing:
        raise ModelError(
            f"layer {missing[0]} of {type(model).__name__} attends without transformers' attention interface, so it "
            "cannot be measured; choose another model."
        )


def packed_slice(tokens: int, window: Window, page_tokens: int) -> slice:
    """Tokens that the last query sees packed.

    Raises:
        DataError: There are none.
    """
    end = packed_end(tokens - 1, window, page_tokens)
    if end == window.sinks:
        raise DataError(
            f"prompts of {tokens} tokens never fill a page of {page_tokens} tokens besides the window, so storing them "
            "costs nothing; give longer prompts."
        )
    return slice(window.sinks, end)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients by parameters, for the time of the context."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, was in training.items():
            module.training = was


def inputs_of(model: PreTrainedModel, prompts: Prompts) -> dict[str, Tensor]:
    """What a model reads; positions count real tokens only, as in `generate`."""
    inputs = {"input_ids": prompts.tokens.to(model.device)}
    if prompts.mask is not None:
        mask = prompts.mask.long().to(model.device)
        inputs["attention_mask"] = mask
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def logits_of(model: PreTrainedModel, prompts: Prompts) -> Tensor:
    """`[batch, tokens, vocabulary]`."""
    logits: Tensor = model(**inputs_of(model, prompts), use_cache=False, return_dict=True).logits
    return logits


def logit_gradient(prompts: Prompts, labels: Labels, logits: Tensor) -> Tensor:
    """Gradient by the logits of the sum over scored tokens of -log p(label): `p - one_hot(label)`, in their dtype.

    Some rows of probabilities exist at a time: a float32 copy of all would be as large as layers of a model.

    Raises:
        DataError: The probabilities are not finite where a token is scored.
    """
    gradient = torch.empty_like(logits)
    for start in range(0, logits.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        scored = prompts.scored[:, rows].to(logits.device)
        probabilities = logits[:, rows].detach().float().softmax(dim=-1)
        _check_finite(probabilities, scored)
        targets = prompts.next_tokens(labels, probabilities, start)[..., None]
        weight = scored[..., None].float()
        gradient[:, rows] = (probabilities * weight).scatter_add_(-1, targets, -weight)
    return gradient


def _check_finite(probabilities: Tensor, scored: Tensor) -> None:
    finite = probabilities.sum(dim=-1).isfinite() | ~scored
    if not bool(finite.all()):
        raise DataError(
            "the model's loss on a calibration prompt is not finite; load the model in a wider dtype (bfloat16 or "
            "float32), or give other prompts."
        )
