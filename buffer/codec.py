"""Groups to bytes and back.

A frame is a fixed header, then one zstd frame with a checksum::

    magic "SLIP" | schema version u16 | flags u16 (0) | raw size u32 | xxh3-64 of the zstd frame | zstd frame

The zstd frame holds, little-endian::

    meta size u32 | int32 count u32 | float32 count u32 | meta (msgpack) | int32 planes | float32 planes

All int32 arrays of the group stand one behind the other and are split into their four byte planes,
then all float32 arrays likewise: bytes of equal weight beside each other are what makes them
compress. In the meta an array is only its length. Decoding checks, in this order: magic, version,
declared size against the limit, checksum, types, shapes, finiteness; nothing of the declared size is
allocated before the checksum holds.

    >>> import numpy as np
    >>> from buffer.schema import Group, Sample, Span, Version
    >>> tokens, logprobs = np.array([5, 6, 7], "i4"), np.array([-0.5], "f4")
    >>> sample = Sample(tokens, 2, logprobs, [1], [Span(1, 0)], 1.0, {}, "stop")
    >>> frame = encode(Group(0, 41, 0, 3, "a", 1, 1.0, [Version(12, "9c")], 0.0, 0.4, [sample]))
    >>> decode(frame).samples[0].tokens.tolist()
    [5, 6, 7]
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import numpy as np
import xxhash
import zstandard

from buffer.errors import RecordError
from buffer.schema import SCHEMA_VERSION, Group, Sample

MAGIC = b"SLIP"
SIZE_LIMIT = 256 << 20
"""Largest raw size in bytes that a reader accepts by default."""

_HEADER = struct.Struct("<4sHHIQ")
_COUNTS = struct.Struct("<III")
_LEVEL = 1
_DTYPES = (np.dtype("<i4"), np.dtype("<f4"))


def encode(group: Group, *, limit: int = SIZE_LIMIT) -> bytes:
    """The frame of a group. Raises `RecordError` if the group is not valid or larger than `limit` bytes."""
    _check(group, "?")
    arrays: dict[np.dtype, list[np.ndarray]] = {dtype: [] for dtype in _DTYPES}

    def length_of(value: Any) -> int:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"cannot encode {type(value).__name__}")
        arrays[value.dtype].append(value)
        return len(value)

    meta = msgspec.msgpack.Encoder(enc_hook=length_of).encode(group)
    flat = [np.concatenate(arrays[dtype]) for dtype in _DTYPES]
    planes = [array.view(np.uint8).reshape(-1, 4).T.tobytes() for array in flat]
    raw = b"".join([_COUNTS.pack(len(meta), *map(len, flat)), meta, *planes])
    if len(raw) > limit:
        raise RecordError(f"got {len(raw)} bytes, the limit is {limit}", field="size", group=group.id)
    body = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(raw)
    return _HEADER.pack(MAGIC, SCHEMA_VERSION, 0, len(raw), xxhash.xxh3_64_intdigest(body)) + body


def decode(frame: bytes, *, entry: str = "?", limit: int = SIZE_LIMIT) -> Group:
    """The group of a frame; its arrays are read-only views of one buffer.

    Raises `RecordError` naming `entry`, the group id where it is known, and the field.
    """
    raw = _decompress(frame, entry, limit)
    if len(raw) < _COUNTS.size:
        raise RecordError(f"got {len(raw)} bytes, expected the counts", field="meta", entry=entry)
    meta_size, ints, floats = _COUNTS.unpack_from(raw)
    start = _COUNTS.size + meta_size
    if len(raw) != start + 4 * (ints + floats):
        problem = f"got {len(raw)} bytes, expected {start + 4 * (ints + floats)}"
        raise RecordError(problem, field="planes", entry=entry)
    group = _decode_meta(raw[_COUNTS.size : start], _unplane(raw, start, ints, floats), entry)
    _check(group, entry)
    return group


def _decompress(frame: bytes, entry: str, limit: int) -> bytes:
    if len(frame) < _HEADER.size or frame[:4] != MAGIC:
        raise RecordError(f"got {bytes(frame[:4])!r}, expected {MAGIC!r}", field="magic", entry=entry)
    _, version, flags, size, checksum = _HEADER.unpack_from(frame)
    if version != SCHEMA_VERSION or flags != 0:
        problem = (
            f"got schema version {version} (flags {flags}), this release reads {SCHEMA_VERSION}; "
            "run actors and learner of one release"
        )
        raise RecordError(problem, field="version", entry=entry)
    body = memoryview(frame)[_HEADER.size :]
    if size > limit:
        raise RecordError(f"declares {size} bytes, the limit is {limit}", field="size", entry=entry)
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise RecordError("does not match the content", field="checksum", entry=entry)
    try:
        # zstd takes the frame's own size for the limit of its output, so that size is checked first.
        declared = zstandard.frame_content_size(body)
        if declared != size:
            raise RecordError(f"zstd declares {declared} bytes, the header {size}", field="size", entry=entry)
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RecordError(str(error), field="zstd", entry=entry) from error


def _unplane(raw: bytes, start: int, ints: int, floats: int) -> dict[np.dtype, np.ndarray]:
    flat = {}
    for dtype, count in zip(_DTYPES, (ints, floats), strict=True):
        planes = np.frombuffer(raw, np.uint8, 4 * count, start).reshape(4, count)
        flat[dtype] = np.ascontiguousarray(planes.T).view(dtype).reshape(count)
        flat[dtype].flags.writeable = False
        start += 4 * count
    return flat


def _decode_meta(meta: bytes, flat: dict[np.dtype, np.ndarray], entry: str) -> Group:
    """Arrays come in wire order: tokens, log-probabilities, tokens, ... each a slice of its plane block."""
    taken = dict.fromkeys(_DTYPES, 0)
    order = [_DTYPES[0], _DTYPES[1]]

    def take(_: type, length: Any) -> np.ndarray:
        dtype = order[0]
        order.reverse()
        begin = taken[dtype]
        if type(length) is not int or not 0 <= length <= len(flat[dtype]) - begin:
            raise ValueError(f"array length {length!r}, {len(flat[dtype]) - begin} left")
        taken[dtype] = begin + length
        return flat[dtype][begin : begin + length]

    try:
        group = msgspec.msgpack.Decoder(Group, dec_hook=take).decode(meta)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise RecordError(str(error) or type(error).__name__, field="meta", entry=entry) from error
    for dtype in _DTYPES:
        if taken[dtype] != len(flat[dtype]):
            problem = f"{len(flat[dtype]) - taken[dtype]} {dtype.name} values belong to no sample"
            raise RecordError(problem, field="planes", entry=entry, group=group.id)
    return group


def _check(group: Group, entry: str) -> None:
    """What every valid group fulfils, whoever made it."""

    def require(holds: bool, field: str, problem: str) -> None:
        if not holds:
            raise RecordError(problem, field=field, entry=entry, group=group.id)

    for name in ("lineage", "position", "attempt", "row"):
        value = getattr(group, name)
        require(0 <= value < 10**10, name, f"got {value}, expected 0 or more")
    require(
        math.isfinite(group.temperature) and group.temperature > 0, "temperature", f"got {group.temperature}"
    )
    require(math.isfinite(group.started) and math.isfinite(group.finished), "started", "times must be finite")
    require(bool(group.versions), "versions", "got none, expected at least one")
    for index, version in enumerate(group.versions):
        require(version.number >= 0, f"versions[{index}]", f"got {version.number}, expected 0 or more")
    require(bool(group.samples), "samples", "got none, expected at least one")
    for index, sample in enumerate(group.samples):
        problem = _sample_problem(sample, len(group.versions))
        require(problem is None, f"samples[{index}].{(problem or ('', ''))[0]}", (problem or ("", ""))[1])


def _sample_problem(sample: Sample, versions: int) -> tuple[str, str] | None:
    """(field, problem) of the first thing wrong with a sample, or None."""
    tokens, logprobs, answer = sample.tokens, sample.logprobs, sample.answer_length
    if tokens.dtype != _DTYPES[0] or tokens.ndim != 1:
        return "tokens", f"got {tokens.dtype} of {tokens.ndim} dimensions, expected int32 of one"
    if logprobs.dtype != _DTYPES[1] or logprobs.ndim != 1:
        return "logprobs", f"got {logprobs.dtype} of {logprobs.ndim} dimensions, expected float32 of one"
    if not 0 < sample.prompt_length <= len(tokens):
        return "prompt_length", f"got {sample.prompt_length} of {len(tokens)} tokens"
    if tokens.min() < 0:
        return "tokens", f"got {tokens.min()}, expected ids of 0 or more"
    if len(logprobs) != answer:
        return "logprobs", f"got {len(logprobs)}, expected {answer}, one an answer token"
    if not np.isfinite(logprobs).all():
        return "logprobs", "got a value that is not finite"
    if any(run < 0 for run in sample.loss_runs) or sum(sample.loss_runs) != answer:
        return "loss_runs", f"got {sample.loss_runs[:8]}, expected runs that sum to {answer}"
    if any(span.length < 1 for span in sample.spans) or sum(span.length for span in sample.spans) != answer:
        return (
            "spans",
            f"got lengths {[span.length for span in sample.spans][:8]}, expected a sum of {answer}",
        )
    if any(not 0 <= span.version < versions for span in sample.spans):
        return "spans", f"got a version index outside the table of {versions}"
    if not all(map(math.isfinite, [sample.reward, *sample.rewards.values()])):
        return "reward", f"got {sample.reward} {sample.rewards}, expected finite numbers"
    return None
