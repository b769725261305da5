"""Records that must not be trained: one valid payload, spoilt in one of many ways."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash
import zstandard

from buffer.codec import MAGIC, encode
from buffer.schema import SCHEMA_VERSION, Group, Version

_HEADER = struct.Struct("<4sHHIQ")


def spoil(group: Group, payload: bytes, damage: random.Random, kinds: Sequence[str]) -> bytes:
    """The payload of a group with damage of a kind that the generator draws."""
    return KINDS[damage.choice(kinds)](group, payload, damage)


def frame(raw: bytes, *, size: int | None = None, version: int = SCHEMA_VERSION) -> bytes:
    """A frame that is valid but for its content, declared size or version."""
    body = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(raw)
    declared = len(raw) if size is None else size
    return _HEADER.pack(MAGIC, version, 0, declared, xxhash.xxh3_64_intdigest(body)) + body


def _raw(payload: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(payload[_HEADER.size :])


def _with_meta(raw: bytes, meta: bytes) -> bytes:
    size, ints, floats = struct.unpack_from("<III", raw)
    return frame(struct.pack("<III", len(meta), ints, floats) + meta + raw[12 + size :])


def flipped(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """One bit is another."""
    spoilt = bytearray(payload)
    spoilt[damage.randrange(len(spoilt))] ^= 1 << damage.randrange(8)
    return bytes(spoilt)


def truncated(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """The end is missing; at least one byte is left, since Redis's own entry is there."""
    return payload[: damage.randrange(1, len(payload))]


def bomb(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """Little that declares, and would become, a lot: 64 MiB where 1 KiB is said, or 2 GiB said outright."""
    if damage.random() < 0.5:
        return frame(bytes(100), size=2**31)
    body = _bomb_body()
    return _HEADER.pack(MAGIC, SCHEMA_VERSION, 0, 1024, xxhash.xxh3_64_intdigest(body)) + body


@functools.cache
def _bomb_body() -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(64)) + compressor.flush()


def deep(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A meta of arrays in arrays."""
    return _with_meta(_raw(payload), b"\x91" * damage.randrange(600, 20_000) + b"\xc0")


def not_finite(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A log-probability that is no number, or infinite."""
    raw = _raw(payload)
    size, ints, floats = struct.unpack_from("<III", raw)
    start = 12 + size + 4 * ints
    planes = np.frombuffer(raw, np.uint8, 4 * floats, start).reshape(4, floats)
    values = np.ascontiguousarray(planes.T).view(np.float32).reshape(floats).copy()
    values[damage.randrange(floats)] = damage.choice([np.nan, np.inf, -np.inf])
    changed = values.view(np.uint8).reshape(-1, 4).T.tobytes()
    return frame(raw[:start] + changed)


def other_tag(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A struct of another name."""
    raw = _raw(payload)
    size = struct.unpack_from("<I", raw)[0]
    return _with_meta(raw, raw[12 : 12 + size].replace(b"\xa5Group", b"\xa5Grape", 1))


def other_group(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A valid record, of another prompt."""
    return encode(msgspec.structs.replace(group, position=group.position + damage.randrange(1, 1000)))


def other_version(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A valid record whose versions are not those it was published with."""
    tags = [Version(tag.number + damage.randrange(1, 9), tag.digest) for tag in group.versions]
    return encode(msgspec.structs.replace(group, versions=tags))


def other_schema(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A record of another release."""
    return frame(_raw(payload), version=SCHEMA_VERSION + damage.randrange(1, 5))


def noise(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """Bytes of no meaning."""
    return damage.randbytes(damage.randrange(1, 300))


KINDS = {
    kind.__name__: kind
    for kind in (
        flipped,
        truncated,
        bomb,
        deep,
        not_finite,
        other_tag,
        other_group,
        other_version,
        other_schema,
        noise,
    )
}
"""Every kind of damage by name."""
