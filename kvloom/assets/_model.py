"""Any causal language model and its tokenizer, by name or folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom._dtypes import torch_dtype
from kvloom.assets._fetch import MODEL_NAME, model_dir
from kvloom.assets._sharding import sharding, shared_device, started_processes
from kvloom.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_OWN = "auto"
"""The word for the dtype of the checkpoint."""


def load_model(
    name_or_path: str | Path = MODEL_NAME,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    sharded: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: "smollm2-135m" (the packaged model), a local folder, or a hub id.
        dtype: of the weights, as a torch dtype or a word for it ("bfloat16", "bf16"), or "auto" for the checkpoint's
            own; by default float32 on a CPU, where 16-bit arithmetic is slower, and the checkpoint's own elsewhere.
        device: where the model goes; by default the first GPU, else the CPU.
        sharded: split the model over the processes that torchrun has started (tensor parallelism); each takes its own
            GPU, or the CPU where there is none. In one process it changes nothing.

    Raises:
        DataError: the packaged model has not been fetched.
        ModelError: there is no such folder or hub id, it is not a causal language model, or it cannot be split; a
            device is given for all processes, or is not here.
        PlanError: the dtype is not known.
    """
    import torch

    if isinstance(dtype, str) and dtype != _OWN:
        dtype = torch_dtype(dtype)
    if sharded and started_processes() > 1:
        kind = shared_device(device)
        return _load(_source(name_or_path), dtype or _usual_dtype(kind), None)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _present(device)
    return _load(_source(name_or_path), dtype or _usual_dtype(device.type), device)


def _present(device: torch.device | str) -> torch.device:
    """A device that can hold a tensor."""
    import torch

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one error for it
        raise ModelError(
            f"device {str(device)!r} is not here ({_first_sentence(error)}): give cpu, cuda or cuda:1."
        ) from None


def _usual_dtype(device_type: str) -> torch.dtype | str:
    import torch

    return torch.float32 if device_type == "cpu" else _OWN


def load_config(name_or_path: str | Path = MODEL_NAME) -> PreTrainedConfig:
    """Load a model's configuration: its shape, without its weights.

    Args:
        name_or_path: as `load_model` takes it.

    Raises:
        DataError: the packaged model has not been fetched.
        ModelError: there is no such folder or hub id, or it has no configuration.
    """
    from transformers import AutoConfig

    source = str(_source(name_or_path))
    with _readable(f"configuration of {source!r}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    return config


def load_tokenizer(name_or_path: str | Path = MODEL_NAME) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        name_or_path: as `load_model` takes it.

    Raises:
        DataError: the packaged model has not been fetched.
        ModelError: there is no such folder or hub id, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    source = str(_source(name_or_path))
    with _readable(f"tokenizer of {source!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    return tokenizer


def _source(name_or_path: str | Path) -> str | Path:
    return _packaged_model() if name_or_path == MODEL_NAME else _checked_path(name_or_path)


def _packaged_model() -> Path:
    folder = model_dir()
    if not folder.is_dir():
        raise DataError(
            f"The packaged model {MODEL_NAME} is not on this machine yet: run `kvloom fetch` "
            "(or `make assets` in the repository)."
        )
    return folder


def _checked_path(name_or_path: str | Path) -> str | Path:
    """Refuse what can only be a folder and is not there; a hub id passes."""
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.startswith((".", "/", "~")):
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ModelError(f"There is no model folder {text!r}: check the path.")
        return folder
    return name_or_path


def _load(
    source: str | Path, dtype: torch.dtype | str, device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on a device, or split over all processes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = sharding() if device is None else {}
    with _readable(f"model {str(source)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(str(source))
        model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, **options)
    return (model if device is None else model.to(device)).eval(), tokenizer


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Say in one sentence what could not be read, and what can be named."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The {what} cannot be loaded ({_first_sentence(error)}): name a local folder of a causal language model, "
            f"a hub id within reach, or {MODEL_NAME!r}."
        ) from error


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
