"""Only what changed since the version that the agent holds: words, by chunk.

After one step at a usual learning rate few words of bf16 weights differ. A chunk's delta is which of its
words changed, one bit a word, and their new values in byte planes, both compressed:

    encode(old, new, word=2)    -> bytes
    decode(delta, old, room)    fills `room` with new

A delta starts from exactly one version, which its digest names, and the chunk it makes is verified like
any other.
"""

from __future__ import annotations

import numpy as np

from buffer.errors import RecordError
from buffer.frame import pack, unpack
from weightsync.errors import SourceError
from weightsync.image import Image, populate
from weightsync.manifest import Manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.peer import answers, ask, connected

WORTH = 0.5
"""A delta of more than this part of the image is not offered: a full pull is then the simpler way."""


class Delta:
    """Pulls the deltas of a `weightsync.holder.Holder` and applies them to the parent's image."""

    kind = "delta"

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` bounds the time without a byte from the holder."""
        self._timeout_s = timeout_s

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """Where the version it starts from is held."""
        return staging is not None and staging.parent is not None

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the holder."""
        with connected(source, self._timeout_s) as connection:
            return ask(connection, source, f"/{version}/manifest")

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """The delta of every missing chunk."""
        assert staging.parent is not None
        held = staging.parent.readable()
        old = memoryview(held)
        with connected(source, self._timeout_s) as connection:
            numbers = staging.missing()
            paths = [f"/{version}/delta/{number}" for number in numbers]
            for number, changed in zip(numbers, answers(connection, source, paths), strict=True):
                chunk = staging.manifest.chunks[number]
                populate(held, chunk.offset, chunk.size)
                with staging.room(number) as room:
                    decode(changed, old[chunk.offset : chunk.offset + chunk.size], room)
                staging.keep(number)


def encode(old: memoryview, new: memoryview, word: int) -> bytes:
    """What changed from `old` to `new`, both of one size, in words of `word` bytes."""
    kind = np.dtype(f"<u{word}")
    whole = len(new) - len(new) % word
    before, after = np.frombuffer(old[:whole], kind), np.frombuffer(new[:whole], kind)
    changed = before != after
    values = after[np.flatnonzero(changed)]
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, word).T)
    parts = [np.packbits(changed).tobytes(), *(plane.tobytes() for plane in planes), bytes(new[whole:])]
    return bytes([word]) + pack(parts)


def decode(delta: bytes, old: memoryview, room: memoryview) -> None:
    """Fills `room` with what `old` became. Raises `SourceError` for what is no delta of these."""
    word = delta[0] if delta else 0
    if word not in (1, 2, 4, 8):
        raise SourceError(f"delta: got words of {word} bytes, expected 1, 2, 4 or 8; the source is damaged")
    try:
        bits, *planes, rest = unpack(delta[1:], word + 2, entry="delta", limit=4 * len(room) + 64)
    except RecordError as error:
        raise SourceError(f"delta: {error}; the source is damaged") from error
    count = len(room) // word
    if len(bits) != (count + 7) // 8 or len(rest) != len(room) - count * word:
        raise SourceError(f"delta: is of another size than {len(room)} bytes; the source is damaged")
    changed = _places(np.frombuffer(bits, np.uint8), count)
    if any(len(plane) != len(changed) for plane in planes):
        raise SourceError("delta: words and their places are not equally many; the source is damaged")
    room[:] = old
    room[count * word :] = rest
    values = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1)
    np.frombuffer(room[: count * word], np.dtype(f"<u{word}"))[changed] = (
        np.ascontiguousarray(values).view(f"<u{word}").reshape(-1)
    )


def _places(bits: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the first `count` bits that are set, in order. Most bytes are 0 and are not unpacked.

    >>> _places(np.array([0, 0b01000001], np.uint8), 16)
    array([ 9, 15])
    >>> _places(np.array([0, 0b01000001], np.uint8), 15)
    array([9])
    """
    there = np.flatnonzero(bits != 0)
    found = np.flatnonzero(np.unpackbits(bits[there]).view(bool))
    places = there[found >> 3] * 8 + (found & 7)
    return places[: np.searchsorted(places, count)]


def deltas(manifest: Manifest, parent: Image, image: Image) -> list[bytes] | None:
    """The delta of every chunk from `parent` to `image`, of one layout; None if that does not pay."""
    if parent.size != image.size:
        return None
    old, new = memoryview(parent.readable()), memoryview(image.readable())
    word = min((entry_word(entry.dtype) for entry in manifest.tensors), default=1)
    found, total = list[bytes](), 0
    for chunk in manifest.chunks:
        place = slice(chunk.offset, chunk.offset + chunk.size)
        found.append(encode(old[place], new[place], word))
        total += len(found[-1])
        if total > WORTH * image.size:
            return None
    return found


def entry_word(dtype: str) -> int:
    """Bytes of an item of a type, 8 at most.

    >>> entry_word("bfloat16"), entry_word("float32"), entry_word("bool")
    (2, 4, 1)
    """
    bits = "".join(letter for letter in dtype.partition("_")[0] if letter.isdecimal())
    return min(8, int(bits) // 8) if bits and int(bits) >= 8 else 1
