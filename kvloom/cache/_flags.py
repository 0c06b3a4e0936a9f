"""What packing notices on the device, for all layers of a cache, raised once a pass instead of at every layer."""

from __future__ import annotations

import torch

from kvloom.errors import CacheError
from kvloom.kernels import OUT_OF_RANGE


class Flags:
    """int32 ``[2]`` on every device that layers use, as in `kvloom.pages.StaticKV`."""

    def __init__(self) -> None:
        self._tensors: dict[torch.device, torch.Tensor] = {}
        self._is_pending = False

    def on(self, device: torch.device) -> torch.Tensor:
        """The flags of a device."""
        if device not in self._tensors:
            with torch.inference_mode(False):  # a cache filled within it is reset without
                self._tensors[device] = torch.zeros(2, dtype=torch.int32, device=device)
        return self._tensors[device]

    def pending(self, device: torch.device) -> torch.Tensor:
        """The flags of a device, for work whose outcome `check` is to look at."""
        self._is_pending = True
        return self.on(device)

    def check(self) -> None:
        """Wait for the devices if there is something to learn.

        Raises:
            CacheError: What was packed since is out of range.
        """
        if self._is_pending:
            self._is_pending = False
            if any(int(flags[0]) for flags in self._tensors.values()):
                raise CacheError(OUT_OF_RANGE)

    def clear(self) -> None:
        """Forget what was noticed."""
        self._is_pending = False
        for flags in self._tensors.values():
            flags.zero_()
