"""Room for one version in a GPU's memory, which engines of the same host read while its guard lets them.

    slot = Slot(ordinal=0, size=manifest.size)                  # the learner, or an agent
    with slot.filling(manifest.label, timeout_s=5.0) as room:   # uint8 [size] on the card
        room.copy_(...)

    with opened(slot.guard.path, manifest) as image:            # an engine
        ...

One slot is all the GPU memory that a process gives to weight sync, the context apart. It is freed only while
nobody has it open.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch

from weightsync.checksum import sums
from weightsync.cuda import driver, tensor_at
from weightsync.errors import SourceError
from weightsync.guard import Contents, Guard, lease
from weightsync.image import Image
from weightsync.manifest import Chunk, Manifest, digest_of
from weightsync.threads import THREADS, side_by_side


class Slot:
    """The owner's end. Lifecycle: any number of `filling`, then `close` or nothing."""

    def __init__(self, ordinal: int, size: int) -> None:
        """`size` bytes on a card that this process sees. Raises `SourceError`, `NoCuda`."""
        self.ordinal, self.size = ordinal, size
        self.card = driver().cards()[ordinal]
        """Identity of the card."""
        free = driver().free_bytes(ordinal)
        if free < size:
            raise SourceError(
                f"GPU {ordinal}: a version takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "give the engine or the learner less, or set another weightsync.transport"
            )
        self._address = driver().allocate(ordinal, size)
        self._handle = driver().export(ordinal, self._address)
        self.guard = Guard()
        self._end = weakref.finalize(self, _release, ordinal, self._address, self.guard, 0.0)
        self._end.atexit = False

    @property
    def memory(self) -> torch.Tensor:
        """The image on the card, uint8 [size]; who reads it has a lease, who writes it uses `filling`."""
        return tensor_at(self._address, self.size, self.ordinal)

    @contextmanager
    def filling(self, label: str, timeout_s: float) -> Iterator[torch.Tensor]:
        """The memory, while nobody reads it; after the block it holds that version, if the block ends well.

        The block waits for what it had the card do. Raises `SourceError`.
        """
        with self.guard.writing(timeout_s) as put:
            yield self.memory
            put(Contents(label, self.card, self._handle, self.size))

    def close(self, timeout_s: float) -> None:
        """Frees the memory, as its end does that nobody closed; may be called twice.

        If somebody still reads after `timeout_s` it goes with the process instead.
        """
        if self._end.detach() is not None:
            _release(self.ordinal, self._address, self.guard, timeout_s)


def _release(ordinal: int, address: int, guard: Guard, timeout_s: float) -> None:
    try:
        with guard.writing(timeout_s):
            driver().free(ordinal, address)
    except SourceError:
        return
    guard.close()


def fill(slot: Slot, manifest: Manifest, image: Image, timeout_s: float) -> Manifest:
    """Brings a host image into a slot; the manifest with the sums of what arrived.

    Every chunk is read back, and what comes back must have the chunk's digest: a sum stands for verified
    bytes. Raises `SourceError`.
    """
    # Streams of its own: the default one is behind all that trains.
    with (
        slot.filling(manifest.label, timeout_s) as room,
        torch.cuda.stream(torch.cuda.Stream(slot.ordinal)),
    ):
        side_by_side(lambda first: _bring(room, manifest, image, first, THREADS), range(THREADS))
        found = sums(room, manifest.chunks)
    chunks = [
        Chunk(chunk.offset, chunk.size, chunk.digest, one)
        for chunk, one in zip(manifest.chunks, found, strict=True)
    ]
    return msgspec.structs.replace(manifest, chunks=chunks)


def _bring(room: torch.Tensor, manifest: Manifest, image: Image, first: int, step: int) -> None:
    """Every `step`-th chunk from the `first` on to the card and back, by pinned memory for two chunks.

    Raises `SourceError`.
    """
    longest = manifest.longest
    with torch.cuda.stream(torch.cuda.Stream(room.device)):
        there, back = (torch.empty(longest, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        sent, got = memoryview(there.numpy()), memoryview(back.numpy())
        for number in range(first, len(manifest.chunks), step):
            chunk = manifest.chunks[number]
            place = room[chunk.offset : chunk.offset + chunk.size]
            image.read(chunk.offset, sent[: chunk.size])
            place.copy_(there[: chunk.size], non_blocking=True)
            back[: chunk.size].copy_(place, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            if (digest := digest_of(got[: chunk.size])) != chunk.digest:
                raise SourceError(
                    f"version {manifest.version}: chunk {number}: got digest {digest} back from GPU "
                    f"{room.device.index}, expected {chunk.digest}; its memory is damaged"
                )


@contextmanager
def opened(guard: str, manifest: Manifest) -> Iterator[torch.Tensor]:
    """A version in another process's slot, uint8 [bytes]; valid within the block.

    Raises `SourceError` where it cannot be had, and after the block if its owner has ended meanwhile.
    """
    cards = driver().cards()
    with lease(guard, manifest.label) as held:
        contents = held.contents
        if contents.card not in cards or contents.size != manifest.size:
            raise SourceError(
                f"slot {guard}: {contents.size} bytes on GPU {contents.card}, expected {manifest.size} on "
                f"one of {', '.join(cards)}, which this process sees; let the engine see the learner's, too"
            )
        ordinal = cards.index(contents.card)
        address = driver().open(ordinal, contents.handle)
        try:
            yield tensor_at(address, contents.size, ordinal)
            torch.cuda.synchronize(ordinal)
            held.check()
        finally:
            driver().close(ordinal, address)
