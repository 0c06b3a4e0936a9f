"""The eviction table: what keeping a share of a prompt's tokens would cost each layer in quality."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvloom.plan import Evict, Fingerprint, Window
from kvloom.signals._calibration import Calibration


class EvictionTable(BaseModel):
    """Predicted loss of every layer under every candidate eviction, with the kept tokens read exactly.

    Eviction is zero bits: these losses and those of formats (`LossTable`) add up to a plan's predicted loss. A layer
    that keeps all tokens loses nothing and is no candidate.

    Attributes:
        model: the model that was measured.
        window: the tokens that stay, which the losses take for granted.
        prompt: tokens of the prompts that a policy chose from.
        candidates: what each column evicts; budgets are shares of the prompt.
        loss: [layers][candidates], mean over prompts, in nats of KL divergence per token that follows the prompt.
        spread: [layers][candidates], standard deviation of the loss over prompts.
        calibration: what the model read, each prompt with the tokens that follow it.
        seconds: time the measurement took.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Fingerprint
    window: Window
    prompt: int = Field(ge=1)
    candidates: list[Evict] = Field(min_length=1)
    loss: list[list[float]]
    spread: list[list[float]]
    calibration: Calibration
    seconds: float = Field(ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> EvictionTable:
        if any(isinstance(each.budget, int) for each in self.candidates):
            raise ValueError("candidates must have shares of all tokens as budgets")
        if any(each in self.candidates[:n] for n, each in enumerate(self.candidates)):
            raise ValueError("candidates must not name the same eviction twice")
        layers = len(self.model.packed_layers)
        for name, rows in (("loss", self.loss), ("spread", self.spread)):
            if len(rows) != layers or any(len(row) != len(self.candidates) for row in rows):
                raise ValueError(f"{name} must have {layers} rows (layers) of {len(self.candidates)} (candidates)")
        return self

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the candidates' policies, in the order of the candidates."""
        return tuple(dict.fromkeys(each.policy for each in self.candidates))
