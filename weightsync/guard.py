"""Who may read a slot of GPU memory, and who may write it: never both, and a death ends either.

CUDA leaves undefined what becomes of shared memory that is freed or written while others have it open, and
nothing in it says who has. So a slot has a guard, a memory file of its owner's, on which a reader has a
shared lock and a writer an exclusive one. The kernel gives a lock back when its process is gone, however
it went. What the slot holds stands in the guard and is read under the lock.

    guard = Guard()                                     # the owner
    with guard.writing(timeout_s=5.0) as put:
        ...                                             # nobody has the slot open
        put(Contents("12:9c...", card, handle, size))

    with lease(guard.path, "12:9c...") as held:         # any process of the host
        ...                                             # nobody writes
        held.check()                                    # and the owner still lives
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from weightsync.errors import SourceError

_LOOK_S = 0.005


class Place(msgspec.Struct, frozen=True):
    """A version in GPU memory, where an engine of this host can read it."""

    guard: str
    """Path of its slot's guard."""


class Contents(msgspec.Struct, frozen=True):
    """What a slot holds."""

    label: str
    """As `Manifest.label`."""
    card: str
    """Identity of the GPU, as `weightsync.cuda.Driver.cards` says it."""
    handle: bytes
    """By which other processes open the memory."""
    size: int
    """Bytes of the image; it begins where the memory begins."""


class Guard:
    """The owner's end. Lifecycle: any number of `writing`, then `close`."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("slipstream-slot", os.MFD_CLOEXEC)

    @property
    def path(self) -> str:
        """Where other processes of this user on this host find it, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @contextmanager
    def writing(self, timeout_s: float) -> Iterator[Callable[[Contents], None]]:
        """Nobody reads within the block; what it is given in the end is what the slot holds from then on.

        If the block gives nothing, or fails, the slot holds nothing. Raises `SourceError` if readers
        do not leave within `timeout_s`; the slot then is as it was.
        """
        deadline = time.monotonic() + timeout_s
        while not _locked(self._descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise SourceError(
                    f"slot {self.path}: is still being read after {timeout_s:g} s; an engine is slow or hangs"
                )
            time.sleep(_LOOK_S)
        given: list[Contents] = []
        try:
            os.ftruncate(self._descriptor, 0)
            yield given.append
            if given:
                os.pwrite(self._descriptor, msgspec.msgpack.encode(given[-1]), 0)
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Nobody finds it any more."""
        os.close(self._descriptor)


class Lease:
    """A reader's hold on a slot."""

    def __init__(self, path: str, descriptor: int, contents: Contents) -> None:
        """Use `lease`."""
        self.contents = contents
        self._path, self._identity = path, _identity(os.fstat(descriptor))

    def check(self) -> None:
        """Raises `SourceError` if the slot's owner is gone, and what was read may be anything.

        A process that ends loses its files before the driver takes its memory back.
        """
        try:
            alive = _identity(os.stat(self._path)) == self._identity
        except OSError:
            alive = False
        if not alive:
            raise SourceError(f"slot {self._path}: its process ended while it was read")


@contextmanager
def lease(path: str, label: str) -> Iterator[Lease]:
    """Holds a slot as long as the block lasts. Raises `SourceError` if it does not hold that version."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"slot {path}: {error.strerror}; its process is gone, or another user's") from error
    try:
        if not _locked(descriptor, fcntl.LOCK_SH):
            raise SourceError(f"slot {path}: is being written; a newer version is on its way")
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        try:
            contents = msgspec.msgpack.decode(content, type=Contents) if content else None
        except msgspec.DecodeError as error:
            raise SourceError(f"slot {path}: {error}; it is no slot of this release") from error
        if contents is None or contents.label != label:
            held = contents.label if contents else "nothing"
            raise SourceError(f"slot {path}: holds {held}, expected {label}; a newer version is on its way")
        yield Lease(path, descriptor, contents)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """Whether a lock could be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
