"""What the host learns of a step, copied while the device goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


class Mirror:
    """Copies of chosen tokens on the host.

    Args:
        device: Of the tokens.
        batch: Sequences.
    """

    def __init__(self, device: torch.device, batch: int) -> None:
        is_cuda = device.type == "cuda"
        self._tokens = torch.zeros(batch, dtype=torch.int64, pin_memory=is_cuda)
        self._goes_on = torch.zeros((), dtype=torch.bool, pin_memory=is_cuda)
        self._taken = torch.cuda.Event() if is_cuda else None

    def take(self, tokens: Tensor, unfinished: Tensor) -> None:
        """Begin to copy.

        Args:
            tokens: int64 ``[batch]``.
            unfinished: bool ``[batch]``.
        """
        self._tokens.copy_(tokens, non_blocking=True)
        self._goes_on.copy_(unfinished.any(), non_blocking=True)
        if self._taken is not None:
            self._taken.record(torch.cuda.current_stream(tokens.device))

    def show(self, streamer: BaseStreamer | None) -> bool:
        """Wait for the copies and stream the tokens; whether a sequence is unfinished."""
        if self._taken is not None:
            self._taken.synchronize()
        if streamer is not None:
            streamer.put(self._tokens.clone())
        return bool(self._goes_on)
