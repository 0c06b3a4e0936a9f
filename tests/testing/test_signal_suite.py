"""The conformance suite can fail: each check finds the signal that breaks what it checks, in a sentence."""

from __future__ import annotations

import pytest
import torch

from kvloom import signals, testing
from kvloom.signals import Evidence, LayerSignal, ModelSignal, Signal, get


class Bits(LayerSignal):
    """Right: mean square of the states, times a step's square."""

    name = "wrong"

    def score(self, evidence: Evidence) -> torch.Tensor:
        energy = evidence.states[:, :, evidence.packed].square().mean(dim=(2, 3))
        factors = torch.tensor([0.0 if fmt.is_passthrough else 4.0**-fmt.bits for fmt in evidence.formats])
        return energy[:, :, None] * factors


class Nameless(Bits):
    name = ""


class Misled(Bits):
    labels = "drawn"


class Reserved(Bits):
    name = "weight_gradient"


class OfNothing(Signal):
    name = "wrong"


class Undefined(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        return (super().score(evidence) - 1e3).sqrt()


class OfTheFirstFormat(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        return super().score(evidence)[..., :1]


class HeadsLast(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        return super().score(evidence).transpose(1, 2)


class Negative(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        return scores - 1e-3 if evidence.side == "value" and evidence.layer == 1 else scores


class Drawn(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        return scores * (1 + torch.rand(len(scores), 1, 1))


class Remembering(Bits):
    """Relative to the largest score it has ever given."""

    def __init__(self) -> None:
        self.largest = 0.0

    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        self.largest = max(self.largest, float(scores.max()))
        return scores / self.largest


class Rising(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        return scores.flip(-1) if evidence.side == "key" else scores


class Rounding(Bits):
    """Takes 16 bits for one of its grids."""

    def score(self, evidence: Evidence) -> torch.Tensor:
        return super().score(evidence) + 1e-3


class BatchWide(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        return scores / scores.sum(dim=0).clamp_min(1e-9)


class Alternating(Bits):
    """Every second prompt counts double."""

    def __init__(self) -> None:
        self.read: dict[tuple[str, int], int] = {}

    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        unit = evidence.side, evidence.layer
        first = self.read.get(unit, 0)
        self.read[unit] = first + len(scores)
        return scores * (1 + torch.arange(first, first + len(scores)) % 2)[:, None, None]


class InPlace(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        scores = super().score(evidence)
        evidence.states.mul_(1.5)
        return scores


class Hooked(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        evidence.model.get_decoder().layers[evidence.layer].register_forward_hook(lambda *_: None)
        return super().score(evidence)


class Noting(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        evidence.model.lm_head.seen = evidence.states
        return super().score(evidence)


class Differentiating(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        weight = evidence.model.lm_head.weight
        weight.grad = torch.zeros_like(weight)
        return super().score(evidence)


class Scaling(Bits):
    def score(self, evidence: Evidence) -> torch.Tensor:
        evidence.model.lm_head.weight.data.mul_(2)
        return super().score(evidence)


class OfTheModel(ModelSignal):
    """Right: the norm of the embeddings of a prompt, alike in every layer."""

    name = "wrong"

    def steps(self, meter):
        return 1

    def piece(self, meter, prompts):
        norms = meter.model.get_input_embeddings()(prompts.tokens).square().mean(dim=(1, 2))
        found = {}
        for side, formats in meter.formats.items():
            factors = torch.tensor([0.0 if fmt.is_passthrough else 4.0**-fmt.bits for fmt in formats])
            found[side] = (norms[:, None] * factors)[:, None, None].repeat(1, len(meter.layers), 1, 1).detach()
        return found

    def identity(self, prompts):
        return prompts.identity

    def measure(self, meter, prompts, pieces, step):
        found = pieces.get(dict(self.identity(prompts)), lambda: self.piece(meter, prompts))
        step()
        return found


class Evaluating(OfTheModel):
    def measure(self, meter, prompts, pieces, step):
        meter.model.eval()
        return super().measure(meter, prompts, pieces, step)


class Eager(OfTheModel):
    def measure(self, meter, prompts, pieces, step):
        meter.model.set_attn_implementation("eager")
        return super().measure(meter, prompts, pieces, step)


class Frozen(OfTheModel):
    def measure(self, meter, prompts, pieces, step):
        meter.model.requires_grad_(False)
        return super().measure(meter, prompts, pieces, step)


class Silent(OfTheModel):
    def steps(self, meter):
        return 3


class OnePiece(OfTheModel):
    """Its pieces are the same for every prompt."""

    def identity(self, prompts):
        return {"embeddings": True}


WRONG = [
    (Nameless(), testing.check_kind, "Nameless has no name"),
    (OfNothing(), testing.check_kind, "neither a LayerSignal nor a ModelSignal"),
    (Misled(), testing.check_kind, "labels is 'drawn', not 'true', 'sampled' or None"),
    (Reserved(), testing.check_losses, "the signal name 'weight_gradient' is taken"),
    (Undefined(), testing.check_losses, "no finite number for the keys of layer 0"),
    (OfTheFirstFormat(), testing.check_losses, r"as \[1, 3, 2, 1\]: give \[1 prompts, 2 heads or 1, 6 formats\]"),
    (HeadsLast(), testing.check_losses, r"as \[1, 3, 6, 2\]: give"),
    (Negative(), testing.check_losses, r"the values of layer 1 lose -\S+ at 16b, less than nothing"),
    (Silent(), testing.check_losses, "calls step 1 times, and steps says 3"),
    (Drawn(), testing.check_losses_repeat, "other losses the second time"),
    (Remembering(), testing.check_losses_repeat, "other losses the second time"),
    (Rising(), testing.check_bits, "more bits must not lose more"),
    (Rounding(), testing.check_bits, r"the keys of layer 0 lose \S+ at 16 bits, which round nothing"),
    (BatchWide(), testing.check_prompts_apart, "change with the others of its batch"),
    (Alternating(), testing.check_prompts_apart, "the losses change with the order of the prompts"),
    (OnePiece(), testing.check_resumed, "other losses with kept pieces"),
    (InPlace(), testing.check_untouched, "score changes the states or gradients"),
    (Hooked(), testing.check_untouched, "leaves the model with other hooks"),
    (Noting(), testing.check_untouched, "leaves the model with other modules or attributes"),
    (Differentiating(), testing.check_untouched, "leaves the model with other gradients"),
    (Scaling(), testing.check_untouched, "leaves the model with other weights"),
    (Evaluating(), testing.check_untouched, "leaves the model with other training modes"),
    (Eager(), testing.check_untouched, "leaves the model with other attention"),
    (Frozen(), testing.check_untouched, "leaves the model with other trainable parameters"),
]


@pytest.mark.parametrize(
    ("signal", "check", "says"), WRONG, ids=lambda x: type(x).__name__ if isinstance(x, Signal) else ""
)
def test_a_wrong_signal_is_found(signal: Signal, check: testing.SignalCheck, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check(signal)
    check(Bits())
    assert "wrong" not in signals.signals()


@pytest.mark.parametrize("signal", [Undefined(), Drawn(), Rising(), Hooked()], ids=lambda x: type(x).__name__)
def test_the_whole_suite_finds_it_too(signal: Signal) -> None:
    with pytest.raises(AssertionError, match=r"^wrong: "):
        testing.check_signal(signal)


@pytest.mark.parametrize("signal", [Bits(), OfTheModel()], ids=lambda x: type(x).__name__)
def test_a_signal_of_ones_own_passes(signal: Signal) -> None:
    testing.check_signal(signal)
    assert "wrong" not in signals.signals()


def test_a_name_means_what_it_did_before() -> None:
    before = get("fisher")
    with signals.registered(type("Mine", (Bits,), {"name": "fisher"})()):
        assert get("fisher") is not before
    assert get("fisher") is before
    with (
        pytest.raises(ValueError, match="'weight_gradient' is taken"),
        signals.registered(type("Mine", (Bits,), {"name": "weight_gradient"})()),
    ):
        pass


def test_random_numbers_are_drawn_as_without_the_suite() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    testing.check_signal(Bits())
    assert torch.rand(3).equal(expected)
