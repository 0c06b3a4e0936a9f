"""Models split over the processes that torchrun has started (tensor parallelism, by the model's own plan)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvloom.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def started_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> dict[str, Any]:
    """Options of `from_pretrained` that split a model over all processes; it takes the device of each."""
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=started_processes(), tp_plan="auto")}


def shared_device(asked: torch.device | str | None) -> str:
    """The kind of device that processes take: each a GPU of its own, or the CPU where there is none.

    Args:
        asked: None, or that kind.

    Raises:
        ModelError: another device is asked for.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    if asked is not None and str(asked) != kind:
        raise ModelError(
            f"device {str(asked)!r} cannot be that of {started_processes()} processes: leave it out, and each takes a "
            "GPU of its own, or the CPU where there is none."
        )
    return kind


def random_sharded(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama with random weights, in evaluation mode, of which each process makes its own part."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # else every weight is reported to be missing from the checkpoint, which there is not
    try:
        model: Any = LlamaForCausalLM.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **sharding())
    finally:
        logging.set_verbosity(before)
    made: PreTrainedModel = model.eval()
    return made
