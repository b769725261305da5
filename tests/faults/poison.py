"""Records that must not be trained: one valid payload, spoilt in one of many ways."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Sequence

import msgspec
import xxhash
import zstandard

from buffer.codec import encode
from buffer.frame import MAGIC, Bytes, pack, unpack
from buffer.schema import SCHEMA_VERSION, Group, Version

PARTS = 9
"""Of a group's frame: the meta, four planes of int32 arrays, four of float32 arrays, lowest bytes first."""
_VERSION_AT, _SIZE_AT = 4, 8
"""Offsets in the frame's header."""


def spoil(group: Group, payload: bytes, damage: random.Random, kinds: Sequence[str]) -> bytes:
    """The payload of a group with damage of a kind that the generator draws."""
    return KINDS[damage.choice(kinds)](group, payload, damage)


def flipped(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """One bit is another."""
    spoilt = bytearray(payload)
    spoilt[damage.randrange(len(spoilt))] ^= 1 << damage.randrange(8)
    return bytes(spoilt)


def truncated(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """The end is missing."""
    return payload[: damage.randrange(1, len(payload))]


def bomb(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """Little that says, or would become, a lot: 2 GiB by its header, or 64 MiB where 1 KiB is declared."""
    if damage.random() < 0.5:
        return _header(payload, "<I", _SIZE_AT, 2**31)
    sizes = [1024, len(_compressed_bomb()), *[0] * (2 * PARTS - 2)]
    body = struct.pack(f"<{2 * PARTS}I", *sizes) + _compressed_bomb()
    return struct.pack("<4sHHIQ", MAGIC, SCHEMA_VERSION, 0, 1024, xxhash.xxh3_64_intdigest(body)) + body


def deep(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A meta of arrays in arrays."""
    return pack([b"\x91" * damage.randrange(600, 20_000) + b"\xc0", *_parts(payload)[1:]])


def not_finite(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A log-probability that is no number, or infinite."""
    planes = [bytearray(part) for part in _parts(payload)]
    value, place = damage.choice([0x7FC00000, 0x7F800000, 0xFF800000]), damage.randrange(len(planes[-1]))
    for plane, byte in zip(planes[-4:], value.to_bytes(4, "little"), strict=True):
        plane[place] = byte
    return pack([bytes(plane) for plane in planes])


def other_tag(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A struct of another name."""
    meta, *planes = _parts(payload)
    return pack([bytes(meta).replace(b"\xa5Group", b"\xa5Grape", 1), *planes])


def other_group(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A valid record, of another prompt."""
    return encode(msgspec.structs.replace(group, position=group.position + damage.randrange(1, 1000)))


def other_version(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A valid record whose versions are not those it was published with."""
    tags = [Version(tag.number + damage.randrange(1, 9), tag.digest) for tag in group.versions]
    return encode(msgspec.structs.replace(group, versions=tags))


def other_schema(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """A record of another release."""
    return _header(payload, "<H", _VERSION_AT, SCHEMA_VERSION + damage.randrange(1, 5))


def noise(group: Group, payload: bytes, damage: random.Random) -> bytes:
    """Bytes of no meaning."""
    return damage.randbytes(damage.randrange(1, 300))


def _parts(payload: bytes) -> list[Bytes]:
    return unpack(payload, PARTS)


def _header(payload: bytes, kind: str, at: int, value: int) -> bytes:
    """The payload with another number in its header, which the checksum does not cover."""
    spoilt = bytearray(payload)
    struct.pack_into(kind, spoilt, at, value)
    return bytes(spoilt)


@functools.cache
def _compressed_bomb() -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(64)) + compressor.flush()


_ALL = (
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
KINDS: dict[str, Callable[[Group, bytes, random.Random], bytes]] = {kind.__name__: kind for kind in _ALL}
"""Every kind of damage by name."""
