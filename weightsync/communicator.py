"""A group of GPUs of several processes, over NCCL, in which nobody waits for ever.

torch's own NCCL groups end the whole process when an operation is late, or wait without end for somebody
who does not come. This one calls NCCL itself, in its mode without blocking, and looks at the clock; what is
late is aborted, which frees the other ranks' GPUs as well as their own clocks do.

    identity = Communicator.identity()                  # rank 0, which hands it to the others
    group = Group()
    with group.of(identity, rank, size, ordinal, timeout_s=60) as communicator:
        communicator.relay(memory, go_on=lambda: None)  # rank 0's bytes are everybody's then
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from weightsync.errors import NoCuda, SourceError
from weightsync.image import chunk_ranges

PART = 256 << 20
"""Bytes of one operation."""
_DONE, _IN_PROGRESS, _UINT8 = 0, 7, 1
_LOOK_S = 0.0005


class _Identity(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 128),)


class _Config(ctypes.Structure):
    """`ncclConfig_t` as of NCCL 2.14, which is where it began: later ones fill in what is not in it."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


class Communicator:
    """One rank. Lifecycle: made together by all, any number of `relay`, then `close`.

    Everything that fails or is late is a `SourceError`; NCCL that is not there is `NoCuda`.
    """

    def __init__(self, identity: bytes, rank: int, size: int, ordinal: int, timeout_s: float) -> None:
        """Waits until all `size` ranks have come. `ordinal` is this rank's card, which no other rank has."""
        self._library, self._timeout_s = _library(), timeout_s
        self._group, self._ordinal = ctypes.c_void_p(), ordinal
        config = _Config(ctypes.sizeof(_Config), 0xCAFEBEEF, 21400, 0)
        given = _Identity.from_buffer_copy(identity)
        with torch.cuda.device(ordinal):
            self._stream = torch.cuda.Stream()
            try:
                self._do(
                    "ncclCommInitRankConfig",
                    ctypes.byref(self._group),
                    size,
                    given,
                    rank,
                    ctypes.byref(config),
                )
            except SourceError:
                self.close()
                raise

    @staticmethod
    def identity() -> bytes:
        """What a new group is known by; rank 0 listens for the others from then on."""
        identity = _Identity()
        library = _library()
        if status := library.ncclGetUniqueId(ctypes.byref(identity)):
            raise SourceError(f"nccl: ncclGetUniqueId: {_told(library, status)}")
        return bytes(identity)

    def relay(self, memory: torch.Tensor, go_on: Callable[[], None]) -> None:
        """Broadcasts rank 0's bytes, uint8 [bytes] on this rank's card, part by part.

        The next part is on its way while the last one arrives. `go_on` is called before each, and may raise.
        """
        under_way: list[torch.cuda.Event] = []
        with torch.cuda.device(self._ordinal):
            for offset, size in chunk_ranges(memory.numel(), PART):
                go_on()
                under_way.append(self._broadcast(memory[offset : offset + size]))
                if len(under_way) > 1:
                    self._wait(under_way.pop(0))
            for event in under_way:
                self._wait(event)

    def _broadcast(self, part: torch.Tensor) -> torch.cuda.Event:
        address = ctypes.c_void_p(part.data_ptr())
        count, stream = ctypes.c_size_t(part.numel()), ctypes.c_void_p(self._stream.cuda_stream)
        self._do("ncclBroadcast", address, address, count, _UINT8, 0, self._group, stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _wait(self, event: torch.cuda.Event) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not event.query():
            self._check("a broadcast", deadline)
            time.sleep(_LOOK_S)

    def _do(self, name: str, *arguments: Any) -> None:
        """A call, and its end."""
        deadline = time.monotonic() + self._timeout_s
        status = getattr(self._library, name)(*arguments)
        if status not in (_DONE, _IN_PROGRESS):
            raise SourceError(f"nccl: {name}: {_told(self._library, status)}")
        while not self._check(name, deadline):
            time.sleep(_LOOK_S)

    def _check(self, what: str, deadline: float) -> bool:
        """Whether NCCL has taken note of everything asked of it. Raises when something failed or is late."""
        status = ctypes.c_int()
        found = self._library.ncclCommGetAsyncError(self._group, ctypes.byref(status)) or status.value
        if found not in (_DONE, _IN_PROGRESS):
            raise SourceError(f"nccl: {what}: {_told(self._library, found)}")
        if time.monotonic() > deadline:
            raise SourceError(
                f"nccl: {what}: not done after {self._timeout_s:g} s; somebody of the group is gone"
            )
        return bool(found == _DONE)

    def close(self) -> None:
        """Leaves the group at once, whatever the others are at."""
        if self._group:
            with torch.cuda.device(self._ordinal):
                self._library.ncclCommAbort(self._group)
            self._group = ctypes.c_void_p()


class Group:
    """The communicator of the last broadcast, kept for the next one of the same members: making one may take
    longer than a version does on its way.

    Lifecycle: any number of `of`, by one thread at a time, then `close`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.identity, self.size = b"", 0
        """Of what is kept; empty, 0: nothing is."""
        self._communicator: Communicator | None = None

    @contextmanager
    def of(
        self, identity: bytes, rank: int, size: int, ordinal: int, timeout_s: float
    ) -> Iterator[Communicator]:
        """The communicator of an identity, see `Communicator`: the one kept if it is that, in which this
        rank may have another number. After an error none is kept."""
        with self._lock, ExitStack() as failed:
            failed.callback(self._leave)
            if identity != self.identity or self._communicator is None:
                self._leave()
                self._communicator = Communicator(identity, rank, size, ordinal, timeout_s)
                self.identity, self.size = identity, size
            yield self._communicator
            failed.pop_all()

    def close(self) -> None:
        """Leaves what is kept; what another thread uses is left to that, and to the end of the process."""
        if self._lock.acquire(blocking=False):
            self._leave()
            self._lock.release()

    def _leave(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
        self._communicator, self.identity, self.size = None, b"", 0


def _library() -> ctypes.CDLL:
    """NCCL as torch has loaded it."""
    try:
        return ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise NoCuda(f"no NCCL with this torch: {error}") from error


def _told(library: ctypes.CDLL, status: int) -> str:
    library.ncclGetErrorString.restype = ctypes.c_char_p
    text = library.ncclGetErrorString(status)
    return text.decode() if text else f"status {status}"
