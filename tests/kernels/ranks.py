"""Ranks that sum with each other, all of them on one GPU: each has a stream and buffers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom.kernels import _cuda_sums
from kvloom.kernels._cuda_sums import Meeting

DEVICE = torch.device("cuda", 0)


class Ranks:
    """A group of so many.

    While one rank waits for another that is yet to be launched, nothing may wait for the device: kernels are loaded
    here, and memory is reserved, NaN where nobody has written. Streams of two priorities never share a queue.
    """

    def __init__(self, count: int) -> None:
        self.streams = [torch.cuda.Stream(DEVICE, priority=-(rank % 2)) for rank in range(count)]
        zeros = [torch.zeros(_cuda_sums.buffer_nbytes(count), dtype=torch.uint8, device=DEVICE) for _ in range(count)]
        buffers = torch.tensor([zero.data_ptr() for zero in zeros], device=DEVICE)
        self.meetings = [Meeting(rank, count, buffers, _cuda_sums.first_epochs(DEVICE), zeros) for rank in range(count)]
        self._reserve()

    def _reserve(self) -> None:
        for stream in self.streams:
            with torch.cuda.stream(stream):
                poison = [torch.full((1 << 18,), torch.nan, device=DEVICE) for _ in range(64)]
                del poison
        ones = torch.ones(8, device=DEVICE)
        self.sums([[ones.to(dtype)] * len(self.streams) for dtype in (torch.float16, torch.bfloat16, torch.float32)])

    def launch(self, addends: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums of addends, one of every rank, that nobody still writes; wait before reading them."""
        outs = []
        for x, stream, meeting in zip(addends, self.streams, self.meetings, strict=True):
            with torch.cuda.stream(stream):
                outs.append(_cuda_sums.sum_ranks(x, meeting))
        return outs

    def sums(self, several: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """`launch` of one after another, waited for."""
        torch.cuda.synchronize()
        outs = [self.launch(addends) for addends in several]
        torch.cuda.synchronize()
        return outs


def assert_sums(outs: Sequence[torch.Tensor], addends: Sequence[torch.Tensor]) -> None:
    """The sum in the order of ranks, rounded once: within that rounding of float64's, and the same on every rank."""
    in_order = addends[0].float()
    for x in addends[1:]:
        in_order = in_order + x.float()
    assert all(out.dtype == x.dtype and out.shape == x.shape for out, x in zip(outs, addends, strict=True))
    assert all(out.equal(in_order.to(out.dtype)) for out in outs)
    exact = torch.stack([x.double() for x in addends])
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[outs[0].dtype]
    within = exact.sum(0).abs() * unit + exact.abs().sum(0) * len(addends) * 2**-23 + 2**-25
    assert bool(((outs[0].double() - exact.sum(0)).abs() <= within).all())
