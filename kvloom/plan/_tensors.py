"""Calibrated tensors of a plan: too large for its JSON, they lie in a safetensors file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr

from kvloom.errors import PlanError
from kvloom.pages import Role
from kvloom.plan._spec import PlanModel

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".tensors.safetensors"
_REMEDY = "keep the two files together, or make both again with kvloom calibrate --rotate"


class PlanTensors(PlanModel):
    """Tensors that a plan names, read when they are first asked for; two are equal if their files are.

    Attributes:
        file: Name of the file, in the plan's folder.
        sha256: Of the file's bytes, 64 hexadecimal digits.
    """

    file: str = Field(default="kv_plan" + _SUFFIX, pattern=r"^[^/\\]+$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    _folder: Path = PrivateAttr(default=Path())
    _content: bytes | None = PrivateAttr(default=None)
    _tensors: dict[str, Tensor] | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTensors) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> PlanTensors:
        return self

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PlanTensors:
        """Tensors that no file holds yet; `save` writes one.

        Args:
            tensors: By name; on any device.
        """
        from safetensors.torch import save

        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        made = cls(sha256=hashlib.sha256(content).hexdigest())
        made._content = content
        return made

    def locate(self, folder: Path) -> None:
        """Say where the plan's file lies."""
        self._folder = folder

    def save(self, plan: Path) -> PlanTensors:
        """Write the file beside the plan file ``plan``: ``kv_plan.tensors.safetensors`` beside ``kv_plan.json``.

        Returns:
            The same tensors under that name.

        Raises:
            PlanError: They come from a file that is not there any more, or has changed.
        """
        target = plan.with_suffix(_SUFFIX)
        content = self._read()
        partial = target.with_name(target.name + ".partial")
        partial.write_bytes(content)
        partial.replace(target)
        saved = PlanTensors(file=target.name, sha256=self.sha256)
        saved._tensors = self._tensors
        saved.locate(target.parent)
        return saved

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The float16 tensor of that name, on the CPU; the same one at every call.

        Raises:
            PlanError: The file is missing, is not the one the plan was saved with, or has no such tensor.
        """
        if self._tensors is None:
            self._tensors = self._parsed()
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape or str(tensor.dtype) != "torch.float16":
            raise PlanError(f"{self.file} holds no float16 tensor {name} of shape {list(shape)}: {_REMEDY}.")
        return tensor

    def _parsed(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self._read())
        except SafetensorError as error:
            raise PlanError(f"{self.file} is not a safetensors file ({error}): {_REMEDY}.") from None

    def _read(self) -> bytes:
        if self._content is not None:
            return self._content
        path = self._folder / self.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PlanError(f"cannot read {path}, the plan's tensors: {error.strerror}; {_REMEDY}.") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise PlanError(
                f"{path} does not hold the tensors that the plan was saved with (cut short, changed, or another "
                f"plan's): {_REMEDY}."
            )
        return content


def rotation_name(layer: int, side: Role) -> str:
    """Name of a layer's calibrated rotations of one side."""
    return f"layers.{layer}.{side}.rotation"
