"""The loss table: what each format would cost each layer's keys and values in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvloom.errors import DataError
from kvloom.plan import Fingerprint, TensorSpec, Window


class LossTable(BaseModel):
    """Predicted loss of every layer's keys and values under every candidate format.

    The losses of a plan's layers and sides add up to the plan's predicted loss. Every
    `[layers][specs]` field has a row for each of `layers` and a column for each candidate.

    Attributes:
        signal: the name of the signal that predicted the losses.
        model: the model that was measured.
        window: the tokens that stay exact, which the losses take for granted.
        layers: indices of the packed layers, equal to `model.packed_layers`.
        key_specs: the candidate formats of keys.
        value_specs: the candidate formats of values.
        key_loss: [layers][key_specs], mean over prompts; in nats of KL divergence per scored
            token where the signal predicts that, else in the signal's own unit.
        value_loss: [layers][value_specs], likewise.
        key_spread: [layers][key_specs], standard deviation of the loss over prompts.
        value_spread: [layers][value_specs], likewise.
        key_head_loss: [layers][kv_heads][key_specs], each head's share of its layer's loss, or None if the signal does
            not tell heads apart.
        value_head_loss: [layers][kv_heads][value_specs], likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    signal: str = "error_gradient"
    model: Fingerprint
    window: Window = Window()
    layers: list[int] = Field(min_length=1)
    key_specs: list[TensorSpec] = Field(min_length=1)
    value_specs: list[TensorSpec] = Field(min_length=1)
    key_loss: list[list[float]]
    value_loss: list[list[float]]
    key_spread: list[list[float]]
    value_spread: list[list[float]]
    key_head_loss: list[list[list[float]]] | None = None
    value_head_loss: list[list[list[float]]] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LossTable:
        if self.layers != list(self.model.packed_layers):
            raise ValueError(f"layers must equal model.packed_layers {self.model.packed_layers}")
        for name, specs in (("key_specs", self.key_specs), ("value_specs", self.value_specs)):
            if len(set(specs)) != len(specs):
                raise ValueError(f"{name} must not name the same format twice")
        for name, rows, columns in self._grids():
            if len(rows) != len(self.layers) or any(len(row) != columns for row in rows):
                raise ValueError(f"{name} must have {len(self.layers)} rows (layers) of {columns} (specs)")
        for name, layers, losses in (
            ("key_head_loss", self.key_head_loss, self.key_loss),
            ("value_head_loss", self.value_head_loss, self.value_loss),
        ):
            if layers is not None:
                self._check_heads(name, layers, losses)
        return self

    def _check_heads(self, name: str, layers: list[list[list[float]]], losses: list[list[float]]) -> None:
        heads = self.model.num_kv_heads
        if len(layers) != len(losses):
            raise ValueError(f"{name} must have {len(losses)} rows (layers)")
        for rows, loss in zip(layers, losses, strict=True):
            if len(rows) != heads or any(len(row) != len(loss) for row in rows):
                raise ValueError(f"{name} must have {heads} rows (heads) of {len(loss)} (specs) in each layer")
            sums = [sum(column) for column in zip(*rows, strict=True)]
            if not all(isclose(own, whole, rel_tol=1e-6, abs_tol=1e-30) for own, whole in zip(sums, loss, strict=True)):
                raise ValueError(f"{name} must add up to the layers' losses")

    def _grids(self) -> Iterator[tuple[str, Sequence[Sequence[float]], int]]:
        yield "key_loss", self.key_loss, len(self.key_specs)
        yield "key_spread", self.key_spread, len(self.key_specs)
        yield "value_loss", self.value_loss, len(self.value_specs)
        yield "value_spread", self.value_spread, len(self.value_specs)

    def predicted_loss(self, specs: Mapping[int, tuple[TensorSpec, TensorSpec]]) -> float:
        """Predicted loss of a choice of formats, in the unit of the table.

        Args:
            specs: (key, value) formats by layer index; exactly the table's layers.

        Raises:
            DataError: a layer is missing or foreign, or a format was not measured.
        """
        if sorted(specs) != self.layers:
            raise DataError(f"specs must name exactly the layers {self.layers} of the loss table")
        total = 0.0
        for row, layer in enumerate(self.layers):
            key, value = specs[layer]
            total += self.key_loss[row][_column(self.key_specs, key, "key_specs")]
            total += self.value_loss[row][_column(self.value_specs, value, "value_specs")]
        return total


def _column(specs: Sequence[TensorSpec], spec: TensorSpec, field: str) -> int:
    if spec not in specs:
        known = ", ".join(each.label for each in specs)
        raise DataError(
            f"{field} of the loss table lacks {spec.label} (it has {known}), "
            "profile the model with this format among the candidates"
        )
    return specs.index(spec)
