"""What packing notices on a device, learnt without waiting for the device."""

from __future__ import annotations

from functools import cache

import torch

from kvloom.errors import CacheError
from kvloom.kernels import OUT_OF_RANGE


class Watch:
    """The flags that layers' packing sets on one device, see `kvloom.pages.StaticKV`, and their copy on the host.

    Attributes:
        flags: int32 ``[2]`` on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.flags = torch.zeros(2, dtype=torch.int32, device=device)
        self._copy = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def check(self) -> None:
        """Look at the copy if it has arrived, and ask for another; so an error is raised some passes later.

        Raises:
            CacheError: What was packed is out of range.
        """
        if self._copied is not None and not self._copied.query():
            return
        if self._copy[0]:
            raise CacheError(OUT_OF_RANGE)
        self._copy.copy_(self.flags, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@cache
def watch(device: torch.device) -> Watch:
    """The one of a device."""
    return Watch(device)
