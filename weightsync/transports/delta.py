"""Only what changed since the version that the agent holds: words, by chunk.

After one step at a usual learning rate few words of bf16 weights differ. A chunk's delta is how far each
changed word lies from the one before, and their new values, both in byte planes and compressed:

    encode(old, new, word=2)    -> bytes
    decode(delta, room)         changes `room` from old to new

A delta starts from exactly one version, which its digest names, and the chunk it makes is verified like
any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock

import numpy as np

from buffer.errors import RecordError
from buffer.frame import Bytes, pack, unpack
from weightsync.errors import SourceError
from weightsync.image import Image
from weightsync.manifest import Chunk, Manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.threads import HALF, THREADS, shares, side_by_side
from weightsync.transports.peer import answers, ask, connected

WORTH = 0.5
"""A delta of more than this part of the image is not offered: a full pull is then the simpler way."""
_GAP = np.dtype("<u4")
"""How far a changed word lies from the one before, in words."""


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
        side_by_side(partial(self._pull, source, version, staging), shares(staging.missing(), THREADS))

    def _pull(self, source: Source, version: str, staging: Staging, numbers: Sequence[int]) -> None:
        """By one connection."""
        assert staging.parent is not None
        rooms = memoryview(bytearray(staging.manifest.longest))
        with connected(source, self._timeout_s) as connection:
            paths = [f"/{version}/delta/{number}" for number in numbers]
            for number, changed in zip(numbers, answers(connection, source, paths), strict=True):
                chunk = staging.manifest.chunks[number]
                room = rooms[: chunk.size]
                staging.parent.read(chunk.offset, room)
                decode(changed, room)
                staging.keep(number, [room])


def encode(old: memoryview, new: memoryview, word: int) -> bytes:
    """What changed from `old` to `new`, both of one size, in words of `word` bytes."""
    kind = np.dtype(f"<u{word}")
    whole = len(new) - len(new) % word
    before, after = np.frombuffer(old[:whole], kind), np.frombuffer(new[:whole], kind)
    places = np.flatnonzero(before != after)
    gaps = np.diff(places, prepend=0).astype(_GAP)
    return bytes([word]) + pack([*_planes(gaps), *_planes(after[places]), bytes(new[whole:])])


def decode(delta: bytes, room: memoryview) -> None:
    """Makes of the old bytes in `room` the new ones. Raises `SourceError` for what is no delta of these."""
    word = delta[0] if delta else 0
    if word not in (1, 2, 4, 8):
        raise SourceError(f"delta: got words of {word} bytes, expected 1, 2, 4 or 8; the source is damaged")
    limit = (_GAP.itemsize + 1) * len(room) + word
    try:
        *planes, rest = unpack(delta[1:], _GAP.itemsize + word + 1, entry="delta", limit=limit)
    except RecordError as error:
        raise SourceError(f"delta: {error}; the source is damaged") from error
    if len({len(plane) for plane in planes}) > 1:
        raise SourceError("delta: words and their places are not equally many; the source is damaged")
    places = np.cumsum(_words(planes[: _GAP.itemsize], _GAP), dtype=np.int64)
    words = len(room) // word
    if len(rest) != len(room) - words * word or (len(places) and places[-1] >= words):
        raise SourceError(f"delta: is of another size than {len(room)} bytes; the source is damaged")
    kind = np.dtype(f"<u{word}")
    np.frombuffer(room[: words * word], kind)[places] = _words(planes[_GAP.itemsize :], kind)
    room[words * word :] = rest


def _planes(words: np.ndarray) -> list[bytes]:
    """The first byte of every word, then the second, and so on.

    >>> _planes(np.array([0x0102, 0x0304], "<u2"))
    [b'\\x02\\x04', b'\\x01\\x03']
    """
    return [plane.tobytes() for plane in words.view(np.uint8).reshape(-1, words.itemsize).T]


def _words(planes: Sequence[Bytes], kind: np.dtype) -> np.ndarray:
    """Words from their planes."""
    columns = [np.frombuffer(plane, np.uint8) for plane in planes]
    return np.stack(columns, axis=1).view(kind).reshape(-1)


def deltas(manifest: Manifest, parent: Image, image: Image) -> list[bytes] | None:
    """The delta of every chunk from `parent` to `image`, of one layout; None if that does not pay."""
    if parent.size != image.size:
        return None
    old, new = memoryview(parent.readable()), memoryview(image.readable())
    word = min((entry_word(entry.dtype) for entry in manifest.tensors), default=1)
    left, lock = WORTH * image.size, Lock()

    def changed(chunk: Chunk) -> bytes:
        nonlocal left
        if left < 0:
            return b""
        place = slice(chunk.offset, chunk.offset + chunk.size)
        delta = encode(old[place], new[place], word)
        with lock:
            left -= len(delta)
        return delta

    found = side_by_side(changed, manifest.chunks, HALF)
    return found if left >= 0 else None


def entry_word(dtype: str) -> int:
    """Bytes of an item of a type, 8 at most.

    >>> entry_word("bfloat16"), entry_word("float32"), entry_word("bool")
    (2, 4, 1)
    """
    bits = "".join(letter for letter in dtype.partition("_")[0] if letter.isdecimal())
    return min(8, int(bits) // 8) if bits and int(bits) >= 8 else 1
