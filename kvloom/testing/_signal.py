"""The suite for a signal, on a tiny random model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvloom.errors import DataError
from kvloom.plan import TensorSpec
from kvloom.signals import Evidence, LayerSignal, LossTable, ModelSignal, Signal, compute_profile, registered

SignalCheck = Callable[[Signal], None]
_VOCABULARY, _TOKENS = 61, 150
_KEYS = [TensorSpec(bits=bits, grouping="per_channel", group_size=64) for bits in (2, 4, 8, 16)]
_KEYS += [TensorSpec(bits=bits, grouping="per_token", group_size="head_dim") for bits in (2, 4)]
_VALUES = [TensorSpec(bits=bits, grouping="per_token", group_size="head_dim") for bits in (16, 2, 4, 8)]
_NOTHING = 1e-6
"""Of a side's largest loss: what rounding in fp32 makes of none."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_signal(signal: Signal) -> None:
    """Check everything that kvloom asks of a signal; it need not be registered.

    Raises:
        AssertionError: It is not a good citizen; the message says what is wrong.
    """
    for check in SIGNAL_CHECKS:
        check(signal)


def check_kind(signal: Signal) -> None:
    """It has a name, looks at layers or at the model, and its backward pass starts from next tokens there are."""
    if not getattr(signal, "name", ""):
        raise AssertionError(f"{type(signal).__name__} has no name.")
    if not isinstance(signal, LayerSignal | ModelSignal):
        raise AssertionError(f"{signal.name}: it is neither a LayerSignal nor a ModelSignal.")
    if isinstance(signal, LayerSignal) and signal.labels not in (None, "true", "sampled"):
        raise AssertionError(f"{signal.name}: labels is {signal.labels!r}, not 'true', 'sampled' or None.")


def check_losses(signal: Signal) -> None:
    """Every layer, head, side and format has a loss, a finite number that is not negative; every step is reported."""
    steps: list[tuple[int, int]] = []
    table = _table(signal, _tokens(1), progress=lambda done, total, _: steps.append((done, total)))
    for unit, specs, losses in _units(table):
        for spec, loss in zip(specs, losses, strict=True):
            if loss < 0:
                raise AssertionError(f"{signal.name}: {unit} lose {loss:.3g} at {spec.label}, less than nothing.")
    done, total = steps[-1]
    if done != total:
        raise AssertionError(f"{signal.name}: it calls step {done} times, and steps says {total}.")


def check_losses_repeat(signal: Signal) -> None:
    """The same prompts give the same losses, whatever was measured between."""
    model = _model()
    first = _table(signal, _tokens(1), model)
    _table(signal, _tokens(1).flip(1), model)
    if _table(signal, _tokens(1), model) != first:
        raise AssertionError(f"{signal.name}: other losses the second time.")


def check_bits(signal: Signal) -> None:
    """More bits of one grouping lose no more, and 16 bits, which round nothing, lose nothing."""
    for unit, specs, losses in _units(_table(signal, _tokens(2))):
        by_spec = sorted(zip(specs, losses, strict=True), key=lambda pair: (pair[0].grouping, pair[0].bits))
        for (few, more), (many, less) in pairwise(by_spec):
            if few.grouping == many.grouping and less > more + _NOTHING * max(losses):
                raise AssertionError(
                    f"{signal.name}: {unit} lose {less:.3g} at {many.label} and {more:.3g} at {few.label}: more bits "
                    "must not lose more."
                )
            if many.bits == 16 and less > _NOTHING * max(losses):
                raise AssertionError(f"{signal.name}: {unit} lose {less:.3g} at 16 bits, which round nothing.")


def check_prompts_apart(signal: Signal) -> None:
    """Losses do not depend on which prompts are read together, nor on their order.

    Drawn next tokens depend on a prompt's place, so that the text's serve here.
    """
    has_labels = isinstance(signal, LayerSignal) and signal.labels is not None
    labels = "true" if has_labels else None
    alone = _table(signal, _tokens(2), labels=labels)
    if not _alike(alone, _table(signal, _tokens(2), batch=2, labels=labels)):
        raise AssertionError(f"{signal.name}: the losses of a prompt change with the others of its batch.")
    if not _alike(alone, _table(signal, _tokens(2).flip(0), labels=labels)):
        raise AssertionError(f"{signal.name}: the losses change with the order of the prompts.")


def check_resumed(signal: Signal) -> None:
    """Kept pieces are those that were asked for: losses are the same with them, made or read."""
    plain = _table(signal, _tokens(2))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            if not _alike(plain, _table(signal, _tokens(2), out=Path(folder) / "profile.json")):
                raise AssertionError(
                    f"{signal.name}: other losses with kept pieces; ask for each by all that tells it from others "
                    "(prompts.identity, side, layer)."
                )


def check_untouched(signal: Signal) -> None:
    """The model is left as it was, and so is what a pass shows."""
    model = _model().train()
    before = _state(model)
    _table(_Watched(signal) if isinstance(signal, LayerSignal) else signal, _tokens(1), model)
    for (what, was), now in zip(before.items(), _state(model).values(), strict=True):
        if was != now:
            raise AssertionError(f"{signal.name}: it leaves the model with other {what}.")


SIGNAL_CHECKS: tuple[SignalCheck, ...] = (
    check_kind,
    check_losses,
    check_losses_repeat,
    check_bits,
    check_prompts_apart,
    check_resumed,
    check_untouched,
)
"""Checks of a signal."""


class _Watched(LayerSignal):
    """A signal that must not change what it is shown."""

    def __init__(self, signal: LayerSignal) -> None:
        self.name, self.labels = signal.name, signal.labels  # type: ignore[misc]  # as those of the signal
        self._signal = signal

    def score(self, evidence: Evidence) -> Tensor:
        """See `LayerSignal.score`."""
        attention = evidence.attention
        shown = (attention.query, attention.key, attention.value, evidence.inputs, evidence.output_gradient)
        before = [None if x is None else x.clone() for x in shown]
        scores = self._signal.score(evidence)
        if any(x is not None and was is not None and not x.equal(was) for x, was in zip(shown, before, strict=True)):
            raise AssertionError(f"{self.name}: score changes the states or gradients it is shown.")
        return scores


def _model() -> PreTrainedModel:
    """No two of its sizes that scores have are equal; weights sharp enough that attention is not uniform."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def _tokens(prompts: int) -> Tensor:
    """`[prompts, tokens]`, each of two full pages and more."""
    return torch.randint(_VOCABULARY, (prompts, _TOKENS), generator=torch.Generator().manual_seed(1))


def _table(signal: Signal, tokens: Tensor, model: PreTrainedModel | None = None, **options: Any) -> LossTable:
    """What a profile says of the model; what it refuses is an AssertionError."""
    options |= {"signal": signal.name, "key_specs": _KEYS, "value_specs": _VALUES}
    try:
        with registered(signal):
            return compute_profile(model or _model(), tokens, **options).table
    except (DataError, ValueError) as error:
        raise AssertionError(f"{signal.name}: {error}") from error


def _units(table: LossTable) -> Iterator[tuple[str, list[TensorSpec], list[float]]]:
    """Keys and values of every layer, and of every head if the signal tells heads apart, with a loss a format."""
    for side, specs, losses, heads in (
        ("keys", table.key_specs, table.key_loss, table.key_head_loss),
        ("values", table.value_specs, table.value_loss, table.value_head_loss),
    ):
        for row, layer in enumerate(table.layers):
            yield f"the {side} of layer {layer}", specs, losses[row]
            for head, own in enumerate(heads[row] if heads else []):
                yield f"the {side} of head {head} of layer {layer}", specs, own


def _alike(one: LossTable, other: LossTable) -> bool:
    """Whether losses differ by rounding at most."""
    for (unit, _, ours), (same, _, theirs) in zip(_units(one), _units(other), strict=True):
        a, b = torch.tensor(ours), torch.tensor(theirs)
        if unit != same or not torch.allclose(a, b, rtol=1e-3, atol=_NOTHING * float(a.max())):
            return False
    return True


def _state(model: PreTrainedModel) -> dict[str, object]:
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "attention": model.config._attn_implementation,
        "training modes": [module.training for module in modules],
        "hooks": [len(getattr(module, hooks)) for module in modules for hooks in _HOOKS],
        "modules or attributes": [(type(module), sorted(vars(module))) for module in modules],
        "weights": [x.detach().numpy().tobytes() for x in (*parameters, *model.buffers())],
        "gradients": [x.grad is None for x in parameters],
        "trainable parameters": [x.requires_grad for x in parameters],
    }
