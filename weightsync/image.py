"""The bytes of one version in anonymous shared memory, which nobody can change once they are verified.

An image is a memory file without a name (memfd): other processes of this user open it by its path
under `/proc`, it needs no cleaning up after a crash, and it lives as long as anybody has it open. Sealing
makes the kernel refuse every later write, so what was verified once is still that when it is loaded.

    image = Image.allocate(1 << 20)
    image.write(0, data)
    image.seal()
    other = Image.open(image.path, image.size)     # in another process
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import bisect_left, bisect_right
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
import xxhash

from weightsync.errors import SourceError
from weightsync.manifest import CHUNK_BYTES, Chunk, Manifest
from weightsync.threads import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

PIECE_BYTES = 1 << 20
"""What is digested and written at a time: about what a core's own cache holds."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Image:
    """A version's bytes. Lifecycle: `allocate`, writes, `seal`, `close`; or `open`, `close`."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Use `allocate` or `open`."""
        self.descriptor = descriptor
        """Open until `close`."""
        self.size = size
        """Bytes."""

    @classmethod
    def allocate(cls, size: int) -> Image:
        """Memory for `size` bytes; it is taken as it is written."""
        descriptor = os.memfd_create("slipstream-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    @classmethod
    def open(cls, path: str, size: int) -> Image:
        """A sealed image of a process on this host. Raises `SourceError` if it is not there or not sealed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"image {path}: {error.strerror}; its process is gone, or another user's"
            ) from error
        image = cls(descriptor, size)
        found, sealed = os.fstat(descriptor).st_size, image.sealed
        if found != size or not sealed:
            image.close()
            raise SourceError(f"image {path}: got {found} bytes, sealed: {sealed}; expected {size}, sealed")
        return image

    @property
    def path(self) -> str:
        """Where other processes of this user on this host open it, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @property
    def sealed(self) -> bool:
        """Whether nobody can change it any more."""
        try:
            return fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            return False  # no memory file at all

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes at an offset."""
        write_all(self.descriptor, offset, data)

    def read(self, offset: int, room: memoryview) -> None:
        """Fills `room` with the bytes from an offset on. Raises `SourceError` where the image ends before."""
        while room:
            count = os.preadv(self.descriptor, [room], offset)
            if not count:
                raise SourceError(f"image: got {self.size} bytes, expected {len(room)} more")
            room, offset = room[count:], offset + count

    def readable(self) -> mmap.mmap:
        """A mapping to read from; it outlives `close`."""
        assert self.descriptor >= 0, "closed"
        return mmap.mmap(self.descriptor, self.size, mmap.MAP_SHARED, mmap.PROT_READ)

    def private(self) -> mmap.mmap:
        """A mapping to read from, for torch, which wants one that could be written; nobody else sees it."""
        assert self.descriptor >= 0, "closed"
        return mmap.mmap(self.descriptor, self.size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)

    def seal(self) -> None:
        """Ends writing for everybody, for ever."""
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Gives the memory back once nobody else has it open. May be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Reserve:
    """Memory for the next image, taken while nobody waits for it: new pages cost more than what fills them.

        reserve = Reserve()
        image = reserve.allocate(1 << 30)
        ...
        reserve.refill()

    Peak memory stays what it was: the next image would take as much a little later. For one thread at a
    time; `close` may come while another is in `refill`.
    """

    def __init__(self) -> None:
        self._spare: Image | None = None
        self._used, self._closed = 0, False

    @property
    def size(self) -> int:
        """Bytes in reserve."""
        return self._spare.size if self._spare is not None else 0

    def allocate(self, size: int) -> Image:
        """As `Image.allocate`; what is in reserve, if that is as large."""
        self._used, spare, self._spare = size, self._spare, None
        if spare is not None and spare.size != size:
            spare.close()
            spare = None
        return spare or Image.allocate(size)

    def refill(self) -> None:
        """Takes as much as was last used, if anything was since; nothing where there is not enough."""
        size, self._used = self._used, 0
        if not size:
            return
        image = Image.allocate(size)
        try:
            for offset, part in chunk_ranges(size):
                if self._closed:
                    break
                os.posix_fallocate(image.descriptor, offset, part)
        except OSError:
            image.close()  # the next image takes what there is by then
            return
        self._spare = image
        if self._closed:
            self.close()

    def close(self) -> None:
        """Gives the memory back, and keeps none from now on."""
        self._closed, spare, self._spare = True, self._spare, None
        if spare is not None:
            spare.close()


def write_all(descriptor: int, offset: int, data: memoryview) -> None:
    """Writes bytes at an offset of a file."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


_POPULATE_READ = 22
"""`MADV_POPULATE_READ` of Linux 5.14, which Python does not name yet."""


def populate(mapping: mmap.mmap, offset: int, size: int) -> None:
    """Has the kernel fill in the pages of a range at once, which is quicker than one fault after another.

    Only that: nothing else depends on it, and older kernels refuse.
    """
    start = offset - offset % mmap.PAGESIZE
    with suppress(OSError):
        mapping.madvise(_POPULATE_READ, start, offset + size - start)


def chunk_ranges(size: int, chunk_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
    """(offset, size) of the chunks of an image.

    >>> chunk_ranges(5, 2)
    [(0, 2), (2, 2), (4, 1)]
    """
    return [(offset, min(chunk_bytes, size - offset)) for offset in range(0, size, chunk_bytes)]


def pieces(parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes, at most `PIECE_BYTES` at a time."""
    for part in parts:
        for offset, size in chunk_ranges(len(part), PIECE_BYTES):
            yield part[offset : offset + size]


def write_image(
    named: Manifest,
    tensors: Mapping[str, torch.Tensor],
    chunk_bytes: int = CHUNK_BYTES,
    allocate: Callable[[int], Image] = Image.allocate,
) -> tuple[Image, Manifest]:
    """The sealed image of exported tensors (contiguous, on the CPU), and its complete manifest.

    `named` is `Manifest.of` these tensors, with lineage, epoch and parent filled in; `allocate` may be that
    of a `Reserve`.
    """
    import torch

    sizes = {name: (tensor.element_size(), tensor.nbytes) for name, tensor in tensors.items()}
    placed = named.placed(sizes)
    order = sorted(placed.tensors, key=lambda entry: entry.offset)
    parts = [
        memoryview(tensors[entry.name].detach().reshape(-1).view(torch.uint8).numpy()) for entry in order
    ]
    image = allocate(placed.size)
    starts = list(accumulate(map(len, parts), initial=0))
    ranges = chunk_ranges(placed.size, chunk_bytes)

    def write(place: tuple[int, int]) -> str:
        return _write(image, parts, starts, *place)

    digests = side_by_side(write, ranges)
    image.seal()
    chunks = [Chunk(*place, digest) for place, digest in zip(ranges, digests, strict=True)]
    return image, msgspec.structs.replace(placed, chunks=chunks)


def _write(image: Image, parts: Sequence[memoryview], starts: Sequence[int], offset: int, size: int) -> str:
    """Fills a range of an image from the parts, which lie in it from `starts` on; its xxh3-128, hex.

    What was just digested is still in the processor's cache when it is written.
    """
    state, end = xxhash.xxh3_128(), offset + size
    numbers = range(bisect_right(starts, offset) - 1, bisect_left(starts, end))
    within = [parts[number][max(0, offset - starts[number]) : end - starts[number]] for number in numbers]
    for piece in pieces(within):
        state.update(piece)
        image.write(offset, piece)
        offset += len(piece)
    return state.hexdigest()
