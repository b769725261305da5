"""A frame: parts of bytes under one checksum, each compressed where that pays.

    magic "SLIP" | schema version u16 | flags u16 (0) | raw size u32 | xxh3-64 of all that follows
    | raw size u32, stored size u32 of each part | the parts

All numbers are little-endian. A part is stored as it is if its two sizes are equal, else as a zstd frame
with a checksum. Reading checks, in this order: magic, version, declared size against the limit,
checksum, sizes of the parts; nothing is allocated for a part before all of them hold.

    >>> parts = [b"meta", bytes(4096)]
    >>> frame = pack(parts)
    >>> len(frame), [bytes(part) for part in unpack(frame, 2)] == parts
    (63, True)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import xxhash
import zstandard

from buffer.errors import RecordError
from buffer.schema import SCHEMA_VERSION

Bytes = bytes | memoryview

MAGIC = b"SLIP"
SIZE_LIMIT = 256 << 20
"""Largest raw size in bytes that a reader accepts by default."""

_HEADER = struct.Struct("<4sHHIQ")
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=12, write_checksum=True)
"""Level 1, but for short repeats, which byte planes have by chance only: entropy coding does better."""
_PROBE = 4096
"""Bytes in the middle of a part that are compressed first, to see whether it is worth it."""
_GAIN = 8
"""A part is compressed if the probe loses an eighth of its size at least."""


class _Zstd(threading.local):
    """A compressor and a decompressor for each thread: to make one costs as much as to compress 8 KiB."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress
        self.decompress = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress


_zstd = _Zstd()


def pack(parts: Sequence[Bytes]) -> bytes:
    """The frame of parts, which together have less than 4 GiB."""
    stored = [_deflate(part) for part in parts]
    sizes = [len(part) for pair in zip(parts, stored, strict=True) for part in pair]
    index = struct.pack(f"<{len(sizes)}I", *sizes)
    checksum = xxhash.xxh3_64(index)
    for part in stored:
        checksum.update(part)
    header = _HEADER.pack(MAGIC, SCHEMA_VERSION, 0, sum(sizes[::2]), checksum.intdigest())
    return b"".join([header, index, *stored])


def unpack(frame: bytes, count: int, *, entry: str = "?", limit: int = SIZE_LIMIT) -> list[Bytes]:
    """The `count` parts of a frame; those stored as they are, are views of it.

    Raises `RecordError` naming `entry` and what does not hold.
    """
    body, size = _checked(frame, entry, limit)
    index = struct.Struct(f"<{2 * count}I")
    if len(body) < index.size:
        raise RecordError(f"got {len(body)} bytes, expected the sizes of {count}", field="parts", entry=entry)
    sizes = index.unpack_from(body)
    raw, stored, start = sizes[::2], sizes[1::2], index.size
    if sum(raw) != size or start + sum(stored) != len(body):
        problem = (
            f"got {sum(raw)} bytes in {start + sum(stored)}, the frame declares {size} and has {len(body)}"
        )
        raise RecordError(problem, field="parts", entry=entry)
    parts: list[Bytes] = []
    for whole, length in zip(raw, stored, strict=True):
        part = body[start : start + length]
        parts.append(part if length == whole else _inflate(part, whole, entry))
        start += length
    return parts


def _deflate(part: Bytes) -> Bytes:
    middle = max(0, (len(part) - _PROBE) // 2)
    probe = part[middle : middle + _PROBE]
    if len(probe) == 0 or len(_zstd.compress(probe)) > len(probe) - len(probe) // _GAIN:
        return part
    smaller = _zstd.compress(part)
    return smaller if len(smaller) < len(part) else part


def _inflate(part: memoryview, size: int, entry: str) -> bytes:
    try:
        # zstd takes the frame's own size for the limit of its output, so that size is checked first.
        declared = zstandard.frame_content_size(part)
        if declared != size:
            raise RecordError(f"zstd declares {declared} bytes, the index {size}", field="size", entry=entry)
        return _zstd.decompress(part, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RecordError(str(error), field="zstd", entry=entry) from error


def _checked(frame: bytes, entry: str, limit: int) -> tuple[memoryview, int]:
    """What follows the header, and the raw size it declares."""
    if len(frame) < _HEADER.size or frame[:4] != MAGIC:
        raise RecordError(f"got {bytes(frame[:4])!r}, expected {MAGIC!r}", field="magic", entry=entry)
    _, version, flags, size, checksum = _HEADER.unpack_from(frame)
    if version != SCHEMA_VERSION or flags != 0:
        problem = (
            f"got schema version {version} (flags {flags}), this release reads {SCHEMA_VERSION}; "
            "run actors and learner of one release"
        )
        raise RecordError(problem, field="version", entry=entry)
    if size > limit:
        raise RecordError(f"declares {size} bytes, the limit is {limit}", field="size", entry=entry)
    body = memoryview(frame)[_HEADER.size :]
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise RecordError("does not match the content", field="checksum", entry=entry)
    return body, size
