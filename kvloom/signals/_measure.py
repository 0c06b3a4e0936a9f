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
from kvloom.signals._base import Evidence, Labels, Side, Signal
from kvloom.signals._gradient_norm import Projected, find_projections, projected
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, packed_end, tapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Meter:
    """A model made ready to be measured with prompts of one length.

    Args:
        model: The model.
        fingerprint: Its fingerprint.
        key_specs: Candidate formats of keys.
        value_specs: Candidate formats of values.
        window: Tokens the cache will keep exactly.
        tokens: Tokens in each prompt.

    Raises:
        DataError: Prompts of this length never fill a page.
        ModelError: The key and value projections cannot be told, or a format is for keys before a rotary embedding that
            the model does not have.
        PlanError: A format does not fit the model's head_dim, its rotation is calibrated, or its codebook is missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fingerprint: Fingerprint,
        key_specs: Sequence[TensorSpec],
        value_specs: Sequence[TensorSpec],
        window: Window,
        tokens: int,
    ) -> None:
        head_dim = fingerprint.head_dim
        specs: dict[Side, Sequence[TensorSpec]] = {"key": key_specs, "value": value_specs}
        self._formats = {side: [spec.format(head_dim) for spec in specs[side]] for side in specs}
        every = [fmt for formats in self._formats.values() for fmt in formats]
        for side, formats in self._formats.items():
            for fmt in formats:
                check_format(fmt, head_dim, side)
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
        self._page_tokens = page_tokens_of(*every)
        self._packed = packed_slice(tokens, window, self._page_tokens)
        self._model = model
        self._window = window
        self._layers = fingerprint.packed_layers
        self._rope = rope_of(model, self._layers) if any(fmt.pre_rope for fmt in every) else None
        width = fingerprint.num_kv_heads * head_dim
        self._projections = find_projections(model.get_decoder(), self._layers, width)

    def read(self, prompts: Prompts, signals: Mapping[Labels, Sequence[Signal]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Scores one batch: a forward pass, and a backward pass for each kind of labels.

        Returns:
            Scores of keys and of values by the signal's name, float32 `[batch, layers, columns]` on the CPU.

        Raises:
            DataError: The model gives no finite probabilities.
            ModelError: The attention of a packed layer was not seen.
        """
        tap = Tap(self._layers, self._window, self._page_tokens)
        found = {}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            at_rest(self._model),
            tapped(self._model, tap),
            projected(self._projections.values()) as kept,
        ):
            logits = logits_of(self._model, prompts)
            check_seen(self._model, tap)
            probabilities = probabilities_of(logits, prompts)
            for i, (labels, wanted) in enumerate(signals.items(), start=1):
                start = logit_gradient(prompts, labels, probabilities).to(logits.dtype)
                outputs = list(kept.outputs.values())
                gradients = torch.autograd.grad(logits, outputs, start, retain_graph=i < len(signals))
                by_module = dict(zip(kept.outputs, gradients, strict=True))
                for signal in wanted:
                    keys = self._scores(signal, "key", prompts, tap, kept, by_module)
                    values = self._scores(signal, "value", prompts, tap, kept, by_module)
                    found[signal.name] = (keys, values)
        return found

    def _scores(
        self,
        signal: Signal,
        side: Side,
        prompts: Prompts,
        tap: Tap,
        kept: Projected,
        gradients: Mapping[nn.Module, Tensor],
    ) -> Tensor:
        """`[batch, layers, columns]` of one signal for keys or values."""
        rows = []
        for layer in self._layers:
            module, columns = self._projections[layer].of(side)
            attention = tap.caught[layer]
            evidence = Evidence(
                side=side,
                scored=prompts.scored.sum(dim=1).to(attention.key.device),
                attention=attention,
                packed=self._packed,
                inputs=kept.inputs[module],
                output_gradient=gradients[module][..., columns],
                formats=self._formats[side],
                rope=self._rope,
            )
            rows.append(signal.score(evidence).cpu())
        return torch.stack(rows, dim=1)


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


def logits_of(model: PreTrainedModel, prompts: Prompts) -> Tensor:
    """`[batch, tokens, vocabulary]`; positions count real tokens only, as in `generate`."""
    inputs = {"input_ids": prompts.tokens.to(model.device)}
    if prompts.mask is not None:
        mask = prompts.mask.long().to(model.device)
        inputs["attention_mask"] = mask
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits: Tensor = model(**inputs, use_cache=False, return_dict=True).logits
    return logits


def probabilities_of(logits: Tensor, prompts: Prompts) -> Tensor:
    """Float32 `[batch, tokens, vocabulary]`, checked where a token is scored."""
    probabilities = logits.detach().float().softmax(dim=-1)
    finite = probabilities.sum(dim=-1).isfinite().cpu() | ~prompts.scored
    if not bool(finite.all()):
        raise DataError(
            "the model's loss on a calibration prompt is not finite; load the model in a wider dtype (bfloat16 or "
            "float32), or give other prompts."
        )
    return probabilities


def logit_gradient(prompts: Prompts, labels: Labels, probabilities: Tensor) -> Tensor:
    """Gradient by the logits of the sum over scored tokens of -log p(label): `p - one_hot(label)`."""
    scored = prompts.scored.to(probabilities.device)[..., None].float()
    targets = prompts.next_tokens(labels, probabilities)[..., None]
    return (probabilities * scored).scatter_add_(-1, targets, -scored)
