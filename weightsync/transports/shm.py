"""Shared memory of one host: the agent opens the holder's image where it is, and copies nothing."""

from __future__ import annotations

from pathlib import Path

from weightsync.errors import SourceError
from weightsync.image import Image
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.base import this_host


class Shm:
    """Opens `/proc/<holder>/fd/<number>`; the memory stays as long as either side has it open.

    The source's address is the path of the image and that of the manifest, separated by a space.
    """

    kind = "shm"

    def __init__(self) -> None:
        self._host = this_host()

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """On the same host."""
        return source.host == self._host

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from a memory file of the holder's."""
        return manifest_beside(source)

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Takes the holder's image as it is, once every chunk of it is verified."""
        image = Image.open(source.address.partition(" ")[0], staging.manifest.size)
        try:
            staging.adopt(image)
        except BaseException:
            image.close()
            raise


def manifest_beside(source: Source) -> bytes:
    """The manifest in the memory file that a source names after a space. Raises `SourceError`."""
    path = source.address.partition(" ")[2]
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SourceError(f"{source.kind}: {path}: {error.strerror}; its process is gone") from error


def source_of(image: Image, manifest: Image) -> Source:
    """The source of an image that this process holds, and of its manifest in a memory file."""
    return Source("shm", this_host(), f"{image.path} {manifest.path}")
