"""What a model read while it was measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Calibration(BaseModel):
    """What the model read while it was measured.

    Attributes:
        sha256: hash of the prompts' token ids, 64 hexadecimal digits.
        texts: names of the texts, in order.
        prompts: number of prompts.
        tokens: tokens in each prompt.
        seed: seed of the choice of prompts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    texts: list[str]
    prompts: int = Field(ge=1)
    tokens: int = Field(ge=1)
    seed: int
