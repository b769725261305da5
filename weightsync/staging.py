"""A version being brought into local memory, chunk by chunk; only verified chunks count.

staging = Staging(manifest, parent=None)
for number in staging.missing():
    staging.keep(number, parts)             # SourceError if they are not what the manifest says
image = staging.finish()                    # sealed

What comes is digested and written piece by piece, while it is in a core's own cache. So a damaged chunk may
lie in the image, but is among those still missing, and no image is sealed before it came anew.

A version may also come to lie in GPU memory, where its owner has verified it and the engine will:

staging.put(place)
place = staging.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock

import xxhash

from weightsync.errors import SourceError
from weightsync.guard import Place
from weightsync.image import Image, pieces
from weightsync.manifest import Manifest, digest_of
from weightsync.threads import side_by_side


class Staging:
    """The chunks of one version that are here so far; it may be filled from one source after another.

    Lifecycle: `keep` for every missing chunk, or `adopt` or `put` once, then `finish`; or `close`.
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
        self._go_on, self._lock = go_on, Lock()
        self._kept: set[int] = set()
        self._image: Image | None = None
        self._place: Place | None = None

    def go_on(self) -> None:
        """Raises `Superseded` when nobody wants the version any more."""
        self._go_on()

    def missing(self) -> list[int]:
        """Numbers of the chunks that are still to come, in order; a damaged one is among them."""
        return [number for number in range(len(self.manifest.chunks)) if number not in self._kept]

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the version is here yet."""
        return not self._kept

    def keep(self, number: int, parts: Iterable[memoryview]) -> None:
        """Takes the bytes of a chunk, part after part; other chunks may be taken beside it, by other threads.

        Raises `SourceError` if they are others than the manifest says, or there is no memory for them, and
        `Superseded` when nobody wants them any more.
        """
        self._go_on()
        with self._lock:
            if self._image is None:
                self._image = self._allocate(self.manifest.size)
        chunk, state, filled = self.manifest.chunks[number], xxhash.xxh3_128(), 0
        for piece in pieces(parts):
            state.update(piece)
            self._write(number, chunk.offset + filled, piece[: max(0, chunk.size - filled)])
            filled += len(piece)
        self._check(number, state.hexdigest())
        self._kept.add(number)

    def adopt(self, image: Image) -> None:
        """Takes a sealed image that holds the whole version, in place of copying. Raises `SourceError`."""
        self.close()
        view = memoryview(image.readable())

        def verify(number: int) -> None:
            self._go_on()
            chunk = self.manifest.chunks[number]
            self._check(number, digest_of(view[chunk.offset : chunk.offset + chunk.size]))

        everything = range(len(self.manifest.chunks))
        side_by_side(verify, everything)
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

    def close(self) -> None:
        """Forgets what was not finished."""
        if self._image is not None:
            self._image.close()
            self._image = None
        self._kept = set()

    def _write(self, number: int, offset: int, piece: memoryview) -> None:
        assert self._image is not None
        try:
            self._image.write(offset, piece)
        except OSError as error:
            raise SourceError(
                f"version {self.manifest.version}: no memory for chunk {number}: {error.strerror}; free "
                "some, or limit what else runs on this host"
            ) from error

    def _check(self, number: int, got: str) -> None:
        wanted = self.manifest.chunks[number].digest
        if got != wanted:
            raise SourceError(
                f"version {self.manifest.version}: chunk {number} of {len(self.manifest.chunks)}: got digest "
                f"{got}, expected {wanted}; the source is damaged"
            )
