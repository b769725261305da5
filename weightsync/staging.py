"""A version being brought into local memory, chunk by chunk; only verified chunks count.

staging = Staging(manifest, parent=None)
for number in staging.missing():
    read_into(staging.room(number))         # whatever the medium
    staging.keep(number)                    # SourceError if it is not what the manifest says
image = staging.finish()                    # sealed

A chunk comes into one of two buffers. While the next one comes into the other, a thread writes it to the
image, which for memory that is new is cheaper than to fill it through a mapping.

A version may also come to lie in GPU memory, where its owner has verified it and the engine will:

staging.put(place)
place = staging.finish()
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from weightsync.errors import SourceError
from weightsync.guard import Place
from weightsync.image import Image
from weightsync.manifest import Manifest, digest_of

READERS = 2
"""Threads that verify an image which is there already."""


class Staging:
    """The chunks of one version that are here so far; it may be filled from one source after another.

    Lifecycle: `room` and `keep` for every missing chunk, or `adopt` or `put` once, then `finish`; or `close`.
    """

    def __init__(
        self,
        manifest: Manifest,
        parent: Image | None,
        go_on: Callable[[], None],
        allocate: Callable[[int], Image] = Image.allocate,
    ) -> None:
        """`parent` is the image of `manifest.parent` if it is held; `go_on` raises when this is in vain;
        `allocate` may be that of a `Reserve`."""
        self.manifest, self.parent, self._allocate = manifest, parent, allocate
        self._go_on = go_on
        self._kept: set[int] = set()
        self._image: Image | None = None
        self._place: Place | None = None
        self._buffers: list[memoryview] = []
        self._thread: ThreadPoolExecutor | None = None
        self._writing: tuple[int, Future[None]] | None = None
        """The chunk at which the thread is."""

    def go_on(self) -> None:
        """Raises `Superseded` when nobody wants the version any more."""
        self._go_on()

    def missing(self) -> list[int]:
        """Numbers of the chunks that are still to come, in order; a damaged one is among them."""
        self._written()
        return [number for number in range(len(self.manifest.chunks)) if number not in self._kept]

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the version is here yet."""
        self._written()
        return not self._kept

    def room(self, number: int) -> memoryview:
        """Where the bytes of a chunk go. Raises `Superseded` when nobody wants them any more."""
        self._go_on()
        if self._thread is None:
            self._image = self._allocate(self.manifest.size)
            self._thread = ThreadPoolExecutor(1, "weights-write")
        if not self._buffers:
            size = max(chunk.size for chunk in self.manifest.chunks)
            self._buffers = [memoryview(bytearray(size)) for _ in range(2)]
        return self._buffers[0][: self.manifest.chunks[number].size]

    def keep(self, number: int) -> None:
        """The chunk is in its room. Raises `SourceError` if it is damaged, or there was no memory for one."""
        room = self.room(number)
        self._check(number, room)
        assert self._thread is not None
        error = self._written()
        self._writing = (number, self._thread.submit(self._write, number, room))
        self._buffers.reverse()
        if error is None and len(self._kept) + 1 == len(self.manifest.chunks):
            error = self._written()
        if error is not None:
            raise error

    def adopt(self, image: Image) -> None:
        """Takes a sealed image that holds the whole version, in place of copying. Raises `SourceError`."""
        self.close()
        view = memoryview(image.readable())

        def verify(number: int) -> None:
            self._go_on()
            chunk = self.manifest.chunks[number]
            self._check(number, view[chunk.offset : chunk.offset + chunk.size])

        everything = range(len(self.manifest.chunks))
        with ThreadPoolExecutor(READERS, "weights-verify") as threads:
            checks = [threads.submit(verify, number) for number in everything]
            try:
                for check in checks:
                    check.result()
            finally:  # those that are left, if one failed
                threads.shutdown(cancel_futures=True)
        self._image, self._kept = image, set(everything)

    def put(self, place: Place) -> None:
        """The whole version is in a slot, not in host memory. Raises `SourceError` if it has no sums."""
        if any(chunk.sum is None for chunk in self.manifest.chunks):
            raise SourceError(
                f"version {self.manifest.version}: has no sums that a GPU could verify; its learner keeps no "
                "version on a GPU"
            )
        self.close()
        self._place, self._kept = place, set(range(len(self.manifest.chunks)))

    def finish(self) -> Image | Place:
        """The sealed image of the whole version, or where it is in GPU memory."""
        assert not self.missing()
        if self._place is not None:
            return self._place
        assert self._image is not None
        if not self._image.sealed:
            self._image.seal()
        image, self._image = self._image, None
        self.close()
        return image

    def abandon(self) -> None:
        """Others than the last rooms from now on: whoever fills one of those may not have stopped."""
        self._written()
        self._buffers = []

    def close(self) -> None:
        """Forgets what was not finished."""
        self._written()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread, self._buffers = None, []
        if self._image is not None:
            self._image.close()
            self._image = None
        self._kept = set()

    def _written(self) -> SourceError | None:
        """Waits for the thread; why it could not write its chunk."""
        if self._writing is None:
            return None
        (number, writing), self._writing = self._writing, None
        error = writing.exception()
        if error is None:
            self._kept.add(number)
        elif not isinstance(error, SourceError):
            raise error
        return error

    def _write(self, number: int, room: memoryview) -> None:
        """Writes a chunk to the image; in the thread."""
        assert self._image is not None
        try:
            self._image.write(self.manifest.chunks[number].offset, room)
        except OSError as error:
            raise SourceError(
                f"version {self.manifest.version}: no memory for chunk {number}, {len(room)} bytes: "
                f"{error.strerror}; free some, or limit what else runs on this host"
            ) from error

    def _check(self, number: int, data: memoryview) -> None:
        wanted, got = self.manifest.chunks[number].digest, digest_of(data)
        if got != wanted:
            raise SourceError(
                f"version {self.manifest.version}: chunk {number} of {len(self.manifest.chunks)}: got digest "
                f"{got}, expected {wanted}; the source is damaged"
            )
