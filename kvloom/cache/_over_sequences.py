"""What generate does with the sequences of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from kvloom.errors import CacheError


class OverSequences(ABC):
    """A layer that can change every tensor whose first dimension is the batch."""

    device: torch.device

    @abstractmethod
    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change all of them."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch for beam search; ``beam_idx`` int64 ``[batch]``."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences ``indices``."""
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the device of the model."""
        self._map(lambda x: x.to(self.device, non_blocking=True))


def map_in_place(tensors: list[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change tensors that graphs take to stay where they are.

    Raises:
        CacheError: Their shape or device would change.
    """
    for tensor in tensors:
        changed = change(tensor)
        if changed.shape != tensor.shape or changed.device != tensor.device:
            raise CacheError(
                "a cache of fixed size can neither change its batch nor leave its device: leave out max_tokens."
            )
        tensor.copy_(changed)
