"""A copy of a rank's pieces in memory that it shares with the process that writes them.

The memory is anonymous (`memfd`): it has no name to be left behind and no limit of `/dev/shm`. It is taken
once and used for every checkpoint, since the first touch of a page is what costs.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

if TYPE_CHECKING:  # the process that writes needs no model
    from learner.checkpoint.state import Part

_ALIGNED = 64
"""Bytes to whose multiples pieces are aligned."""


class Slot(msgspec.Struct, frozen=True):
    """Where a piece lies in the shared memory."""

    key: str
    """Megatron-Core's name of the whole tensor."""
    shape: tuple[int, ...]
    """Dimensions of the whole."""
    start: tuple[int, ...]
    """Where the piece begins in it."""
    size: tuple[int, ...]
    """Dimensions of the piece."""
    dtype: str
    """As torch names it, without "torch."."""
    offset: int
    """First byte."""

    def view(self, memory: mmap.mmap) -> torch.Tensor:
        """The piece, in place."""
        count = torch.Size(self.size).numel()
        flat = torch.frombuffer(memory, dtype=getattr(torch, self.dtype), count=count, offset=self.offset)
        return flat.view(self.size)


class Snapshot:
    """Memory for one checkpoint at a time.

    snapshot = Snapshot()
    slots = snapshot.take(parts)              # here
    slots[0].view(snapshot_map(fd))           # there, of the file descriptor that it was given
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("checkpoint")
        self._memory: mmap.mmap | None = None
        self._slots: list[Slot] = []

    def take(self, parts: Sequence[Part]) -> list[Slot]:
        """Copies those parts that this rank saves; where they are."""
        mine = [part for part in parts if part.main]
        slots = _laid_out(mine)
        if slots != self._slots or self._memory is None:
            os.ftruncate(self.fd, _size(slots))
            self._memory, self._slots = snapshot_map(self.fd), slots
        for slot, part in zip(slots, mine, strict=True):
            slot.view(self._memory).copy_(part.tensor)
        return slots


def snapshot_map(fd: int) -> mmap.mmap:
    """The shared memory behind a file descriptor, all of it."""
    return mmap.mmap(fd, os.fstat(fd).st_size)


def _laid_out(parts: Sequence[Part]) -> list[Slot]:
    slots, offset = [], 0
    for part in parts:
        dtype = str(part.tensor.dtype).removeprefix("torch.")
        slots.append(Slot(part.key, part.shape, part.start, tuple(part.tensor.shape), dtype, offset))
        offset += -(-part.tensor.nbytes // _ALIGNED) * _ALIGNED
    return slots


def _size(slots: Sequence[Slot]) -> int:
    if not slots:  # a rank all of whose pieces others save
        return 1
    last = slots[-1]
    item = getattr(torch, last.dtype).itemsize
    return last.offset + max(1, torch.Size(last.size).numel()) * item
