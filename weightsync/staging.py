"""A version being brought into local memory, chunk by chunk; only verified chunks count.

staging = Staging(manifest, parent=None)
for number in staging.missing():
    read_into(staging.room(number))         # whatever the medium
    staging.keep(number)                    # SourceError if these are not the chunk's bytes
image = staging.finish()                    # sealed

A version may also come to lie in GPU memory, where its owner has verified it and the engine will:

staging.put(place)
place = staging.finish()
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

from weightsync.errors import SourceError
from weightsync.guard import Place
from weightsync.image import Image
from weightsync.manifest import Manifest, digest_of


class Staging:
    """The chunks of one version that are here so far; it may be filled from one source after another.

    Lifecycle: `room` and `keep` for every missing chunk, or `adopt` or `put` once, then `finish`; or `close`.
    """

    def __init__(self, manifest: Manifest, parent: Image | None, go_on: Callable[[], None]) -> None:
        """`parent` is the image of `manifest.parent` if it is held; `go_on` raises when this is in vain."""
        self.manifest, self.parent = manifest, parent
        self._go_on = go_on
        self._kept: set[int] = set()
        self._image: Image | None = None
        self._map: mmap.mmap | None = None
        self._place: Place | None = None

    def go_on(self) -> None:
        """Raises `Superseded` when nobody wants the version any more."""
        self._go_on()

    def missing(self) -> list[int]:
        """Numbers of the chunks that are still to come, in order."""
        return [number for number in range(len(self.manifest.chunks)) if number not in self._kept]

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the version is here yet."""
        return not self._kept

    def room(self, number: int) -> memoryview:
        """Where the bytes of a chunk go. Raises `Superseded` when nobody wants them any more."""
        self._go_on()
        if self._map is None:
            self._image = Image.allocate(self.manifest.size)
            self._map = self._image.writable()
        chunk = self.manifest.chunks[number]
        return memoryview(self._map)[chunk.offset : chunk.offset + chunk.size]

    def keep(self, number: int) -> None:
        """The chunk is in its room. Raises `SourceError` if it is not what the manifest says."""
        got = digest_of(self.room(number))
        self._check(number, got)
        self._kept.add(number)

    def adopt(self, image: Image) -> None:
        """Takes a sealed image that holds the whole version, in place of copying. Raises `SourceError`."""
        self._drop()
        view = memoryview(image.readable())
        for number, chunk in enumerate(self.manifest.chunks):
            self._go_on()
            self._check(number, digest_of(view[chunk.offset : chunk.offset + chunk.size]))
        self._image, self._kept = image, set(range(len(self.manifest.chunks)))

    def put(self, place: Place) -> None:
        """The whole version is in a slot, not in host memory. Raises `SourceError` if it has no sums."""
        if any(chunk.sum is None for chunk in self.manifest.chunks):
            raise SourceError(
                f"version {self.manifest.version}: has no sums that a GPU could verify; its learner keeps no "
                "version on a GPU"
            )
        self._drop()
        self._place, self._kept = place, set(range(len(self.manifest.chunks)))

    def finish(self) -> Image | Place:
        """The sealed image of the whole version, or where it is in GPU memory."""
        assert not self.missing()
        if self._place is not None:
            return self._place
        assert self._image is not None
        if self._map is not None:
            self._map.close()
            self._map = None
            self._image.seal()
        image, self._image = self._image, None
        return image

    def close(self) -> None:
        """Forgets what was not finished."""
        self._drop()
        self._kept = set()

    def _check(self, number: int, got: str) -> None:
        wanted = self.manifest.chunks[number].digest
        if got != wanted:
            raise SourceError(
                f"version {self.manifest.version}: chunk {number} of {len(self.manifest.chunks)}: got digest "
                f"{got}, expected {wanted}; the source is damaged"
            )

    def _drop(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._image is not None:
            self._image.close()
            self._image = None
