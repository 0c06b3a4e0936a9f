"""Sums over the GPUs of one host: launcher of ``sum_ranks.cu``, and where ranks leave their addends for one another."""

from __future__ import annotations

import logging
import socket
from functools import lru_cache
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from kvloom.errors import KernelError
from kvloom.kernels._base import SUM_NBYTES
from kvloom.kernels._nvrtc import ELEMENTS, Defines, module

MAX_RANKS = 8
GROUP = 256
PIECE = 8
"""Pieces that share an epoch, and bytes of a piece: see ``ranks.cuh``."""
_SLOT = 16  # those bytes and their marks
_GROUPS = SUM_NBYTES // (PIECE * GROUP)
POLLS = 1 << 30  # some minutes: as long as NCCL waits
_POLLS_OF_A_TRY = 1 << 22  # some seconds


class Meeting(NamedTuple):
    """What a rank knows of a group whose ranks write into each other's memory.

    Attributes:
        rank: This rank's place in the group.
        ranks: How many there are.
        buffers: int64 ``[ranks]`` on the device, addresses of the ranks' buffers of `buffer_nbytes`, zeros at first.
        epochs: int32 on the device, see `first_epochs`.
        keeps: What the addresses live by.
    """

    rank: int
    ranks: int
    buffers: torch.Tensor
    epochs: torch.Tensor
    keeps: Any


_meetings: WeakKeyDictionary[Any, dict[torch.device, Meeting | None]] = WeakKeyDictionary()


def sums(x: torch.Tensor) -> bool:
    """Whether `sum_ranks` takes this: so small a message of 16 or 32-bit floats that latency is what counts."""
    return x.dtype in ELEMENTS and 0 < x.nbytes <= SUM_NBYTES and x.nbytes % PIECE == 0


def sum_ranks(x: torch.Tensor, meeting: Meeting) -> torch.Tensor:
    """Sum over ranks in fp32, in their order: the same bits on all of them.

    All ranks call it with tensors of one size and dtype, in the same order of calls, each on one stream.

    Args:
        x: This rank's addend, see `sums`.
        meeting: Of the group.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    x = in_pieces(x)
    return _sum(x, torch.empty_like(x), meeting, rank_defines(x.dtype, meeting.ranks, POLLS))


def in_pieces(x: torch.Tensor) -> torch.Tensor:
    """The same, contiguous, where pieces can be read; on every rank, wherever its own tensor lies."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % PIECE else x


def _sum(x: torch.Tensor, out: torch.Tensor, meeting: Meeting, build: Defines) -> torch.Tensor:
    pieces = x.nbytes // PIECE
    with torch.cuda.device(x.device):
        module("sum_ranks.cu", build).launch(
            "sum_ranks",
            (-(-pieces // GROUP), 1, 1),
            (GROUP, 1, 1),
            *(x, out, pieces, meeting.rank, meeting.buffers, meeting.epochs),
            follows=True,
        )
    return out


def arrives(meeting: Meeting) -> bool:
    """Whether what the others write arrives here; all ranks ask at one time.

    A driver may grant access to a peer that then leads nowhere, as in virtual machines.
    """
    build = rank_defines(torch.float32, meeting.ranks, _POLLS_OF_A_TRY, tries=True)
    numbers = torch.arange(SUM_NBYTES // 4, dtype=torch.float32, device=meeting.buffers.device)
    # Three times: both halves of the buffers, and one again.
    poison = torch.full_like(numbers, torch.nan)
    outs = [_sum(numbers + (meeting.rank + n), poison.clone(), meeting, build) for n in range(3)]
    others = meeting.ranks * (meeting.ranks - 1) // 2
    return all(out.equal(meeting.ranks * (numbers + n) + others) for n, out in enumerate(outs))


def buffer_nbytes(ranks: int) -> int:
    """Bytes of a rank's buffer."""
    return 2 * ranks * _GROUPS * GROUP * _SLOT


def first_epochs(device: torch.device) -> torch.Tensor:
    """int32, one of every group of places."""
    return torch.ones(_GROUPS, dtype=torch.int32, device=device)


def meeting_of(group_name: str, device: torch.device) -> Meeting | None:
    """Where a group's ranks meet, None where they cannot or while a graph is captured that comes before.

    The first call of a group makes the buffers, for which all ranks wait for each other: all have to make it.
    """
    group = cast(Any, distributed_c10d)._resolve_process_group(group_name)
    known = _meetings.setdefault(group, {})
    if device not in known:
        if torch.cuda.is_current_stream_capturing():
            return None
        known[device] = _meet(group, device)
    return known[device]


def _meet(group: Any, device: torch.device) -> Meeting | None:
    """What all ranks have found possible, and done."""
    hosts = _told((socket.gethostname(), _is_able(group, device)), group)
    if len(set(hosts)) > 1 or not hosts[0][1]:
        return None
    try:
        buffer, addresses, offset = _opened(group, device)
        reason = None
    except Exception as error:  # symmetric memory is new in torch, and still changes
        buffer, addresses, offset, reason = None, [], 0, f"{type(error).__name__}: {error}"
    told = _told((offset, reason), group)
    if reasons := [reason for _, reason in told if reason is not None]:
        _say(reasons[0])
        return None
    places = [address + offset for address, (offset, _) in zip(addresses, told, strict=True)]
    buffers = torch.tensor(places, dtype=torch.int64, device=device)
    meeting = Meeting(group.rank(), group.size(), buffers, first_epochs(device), buffer)
    if not all(_told(arrives(meeting), group)):
        _say("what GPUs write to each other does not arrive")
        return None
    return meeting


def _say(reason: str) -> None:
    logging.getLogger("kvloom").info("sums over GPUs are NCCL's: %s", reason)


def _is_able(group: Any, device: torch.device) -> bool:
    if device.type != "cuda" or not 2 <= group.size() <= MAX_RANKS:
        return False
    others = set(range(torch.cuda.device_count())) - {device.index}
    if not all(torch.cuda.can_device_access_peer(device, other) for other in others):
        return False
    try:
        with torch.cuda.device(device):
            module("sum_ranks.cu", rank_defines(torch.float32, group.size(), _POLLS_OF_A_TRY, tries=True))
    except KernelError as error:
        _say(str(error))
        return False
    return True


def _opened(group: Any, device: torch.device) -> tuple[Any, list[int], int]:
    """This rank's buffer, where the allocations of all ranks are seen from here, and how far in its own one is."""
    from torch.distributed import _symmetric_memory as symmetric

    with torch.cuda.device(device):
        buffer = symmetric.empty(buffer_nbytes(group.size()), dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize()
        handle = symmetric.rendezvous(buffer, group.group_name)
    addresses = list(handle.buffer_ptrs)
    return (buffer, handle), addresses, buffer.data_ptr() - addresses[group.rank()]


def _told(mine: object, group: Any) -> list[Any]:
    """What every rank tells the others."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    return told


@lru_cache(maxsize=32)
def rank_defines(dtype: torch.dtype, ranks: int, polls: int, *, tries: bool = False) -> Defines:
    """Defines of ``ranks.cuh``."""
    sizes = (("RANKS", ranks), ("GROUP", GROUP), ("GROUPS", _GROUPS), ("POLLS", polls), ("TRIES", int(tries)))
    return ("ELEMENT", ELEMENTS[dtype]), *sizes
