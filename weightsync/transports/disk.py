"""A folder that learner and actors share: every version is a safetensors file that others can load, too.

<folder>/<version>-<epoch>/model.safetensors    the image behind its header
                           manifest.msgpack     written first; the folder gets its name last
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from math import prod
from pathlib import Path

import msgspec

from weightsync.errors import SourceError
from weightsync.image import PIECE_BYTES, Image, chunk_ranges, populate, write_all
from weightsync.manifest import Manifest, encode_manifest
from weightsync.protocol import Source
from weightsync.staging import Staging

_DTYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1),
    "bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1),
}  # fmt: skip
"""Names of types in the safetensors format, and bytes of an item."""
_WEIGHTS, _MANIFEST = "model.safetensors", "manifest.msgpack"


class Disk:
    """Reads a version's chunks from its file."""

    kind = "disk"

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """Where the folder is there."""
        return Path(source.address).is_dir()

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the folder."""
        try:
            return (Path(source.address) / _MANIFEST).read_bytes()
        except OSError as error:
            raise SourceError(f"disk: {source.address}: {error.strerror}") from error

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Reads every missing chunk where it lies."""
        path, room = Path(source.address) / _WEIGHTS, memoryview(bytearray(PIECE_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                for number in staging.missing():
                    file.seek(start + staging.manifest.chunks[number].offset)
                    staging.keep(number, _parts(file, staging.manifest.chunks[number].size, room, path))
        except OSError as error:
            raise SourceError(f"disk: {path}: {error.strerror}") from error


def _parts(file: FileIO, size: int, room: memoryview, path: Path) -> Iterator[memoryview]:
    """The next `size` bytes of a file, part after part in the same room."""
    while size:
        count = file.readinto(room[:size])
        if not count:
            raise SourceError(f"disk: {path}: ends {size} bytes too early; it is damaged")
        yield room[:count]
        size -= count


def header_of(manifest: Manifest) -> bytes:
    """What stands before the image in a safetensors file: 8 bytes of length, then JSON."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "version": manifest.label}}
    for entry in manifest.tensors:
        dtype, item = _DTYPES[entry.dtype]
        end = entry.offset + item * prod(entry.shape)
        entries[entry.name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [entry.offset, end]}
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: FileIO, header: bytes, image: Image) -> None:
    """Writes header and image to the disk itself: a thread has it begin while more is to come."""
    mapping, descriptor, start = image.readable(), file.fileno(), file.write(header)
    syncing = Future[None]()
    syncing.set_result(None)
    with ThreadPoolExecutor(1, "weights-sync") as thread:
        for offset, size in chunk_ranges(image.size):
            populate(mapping, offset, size)
            write_all(descriptor, start + offset, memoryview(mapping)[offset : offset + size])
            if syncing.done():
                syncing.result()
                syncing = thread.submit(os.fdatasync, descriptor)
    syncing.result()
    os.fsync(descriptor)


def save(root: Path, manifest: Manifest, image: Image, keep: int) -> Source:
    """Writes a version and removes all but the last `keep`; others see it whole or not at all."""
    folder = root / f"{manifest.version:08d}-{manifest.epoch}"
    part = root / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / _MANIFEST).write_bytes(encode_manifest(manifest))
    with (part / _WEIGHTS).open("wb", buffering=0) as file:
        _write(file, header_of(manifest), image)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    versions = [path for path in root.iterdir() if not path.name.startswith(".")]
    # In the order in which they were written: after a fork version numbers go back.
    for old in sorted(versions, key=lambda path: path.stat().st_mtime_ns)[:-keep]:
        shutil.rmtree(old)
    return Source("disk", "", str(folder))
