"""The profile: everything measured about a model, in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvloom.errors import DataError
from kvloom.plan import Fingerprint
from kvloom.signals._calibration import Calibration
from kvloom.signals._eviction_table import EvictionTable
from kvloom.signals._table import LossTable

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_REMEDY = "make a new one with `kvloom profile MODEL -o profile.json`"


class GradientNorms(BaseModel):
    """KVmix's signal (arXiv 2506.08018, equations 2 to 11), one number for each packed layer.

    Attributes:
        key: [layers] norm of the loss's gradient by the key projection's weight, mean over prompts.
        value: [layers] likewise for the value projection.
        key_spread: [layers] standard deviation over prompts.
        value_spread: [layers] likewise.
    """

    model_config = _STRICT

    key: list[float]
    value: list[float]
    key_spread: list[float]
    value_spread: list[float]


class Profile(BaseModel):
    """Everything that was measured about a model: the input of every allocator.

    Attributes:
        schema_version: version of the file format.
        model: the model that was measured.
        gradient: gradient norms of the projections, one for each packed layer; None if the signal takes no backward
            pass.
        table: predicted loss of every candidate format.
        calibration: what the model read.
        seconds: time the measurement took.
        eviction: predicted loss of keeping some tokens only; None if it was not measured.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    model: Fingerprint
    gradient: GradientNorms | None
    table: LossTable
    calibration: Calibration
    seconds: float = Field(ge=0)
    eviction: EvictionTable | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.table.model != self.model:
            raise ValueError("table.model must equal model")
        if self.eviction and (self.eviction.model, self.eviction.window) != (self.model, self.table.window):
            raise ValueError("eviction.model and eviction.window must equal model and table.window")
        for name in ("key", "value", "key_spread", "value_spread") if self.gradient else ():
            if len(getattr(self.gradient, name)) != len(self.table.layers):
                raise ValueError(
                    f"gradient.{name} must have {len(self.table.layers)} numbers, one for each packed layer"
                )
        return self

    def with_eviction(self, table: EvictionTable) -> Profile:
        """The profile with an eviction table.

        Raises:
            DataError: the table is of another model or window.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        try:
            return Profile(**{**fields, "eviction": table})
        except ValidationError as error:
            raise DataError(f"the eviction table is not of this profile: {_first(error)}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON; a crash never leaves half a file at `path`."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile.

        Raises:
            DataError: the file is missing, cut short, or no profile of this version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot read the profile {path}: {error.strerror}, {_REMEDY}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not a text file, so it is no profile, {_REMEDY}") from None
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not complete JSON (line {error.lineno}: {error.msg}), {_REMEDY}") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{path} is not a profile: {_first(error)}, {_REMEDY}") from None


def _first(error: ValidationError) -> str:
    """The first complaint, with the field it is about."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
