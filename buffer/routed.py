"""Routed experts: which experts an engine sent each token of a group to, kept beside the group's record.

The record only says what there is (`buffer.schema.Routed`). The choices of all samples, one behind the
other, are uint16 [N, L, k]: N fed tokens, L layers, k experts. They are cut into chunks of `CHUNK_BYTES` at
most, each a frame (`buffer.frame`) of three parts: its group and number, the low bytes, the high bytes.

The chunks of a group are the fields of a hash of its own, written before the group is published. A group
id is leased once, so chunks of a group that is neither leased nor in the ledger belong to nobody; the index
`{run}:routing` names every group that has some, which is how the sweep finds them.

    >>> import numpy as np
    >>> from buffer.schema import Group, Sample, Span, Version
    >>> choices = np.array([[[3, 1]], [[0, 2]]], "u2")      # 2 fed tokens, 1 layer, 2 experts each
    >>> tokens, logprobs = np.array([5, 6, 7], "i4"), np.array([-0.5], "f4")
    >>> sample = Sample(tokens, 2, logprobs, [1], [Span(1, 0)], 1.0, {}, "stop", choices)
    >>> group, chunks = detach(Group(0, 41, 0, 3, "a", 1, 1.0, [Version(12, "9c")], 0.0, 0.4, [sample]))
    >>> group.routed, group.samples[0].routed is None, len(chunks)
    (Routed(layers=1, chosen=2, chunks=1), True, 1)
    >>> attach(group, chunks).samples[0].routed.tolist()
    [[[3, 1]], [[0, 2]]]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from buffer.client import AsyncStream, Stream
from buffer.errors import RecordError
from buffer.frame import Bytes, pack, unpack
from buffer.keys import routed_key
from buffer.schema import Group, Routed

CHUNK_BYTES = 8 << 20
"""Largest raw size of a chunk's choices."""
_LABEL_BYTES = 256


def detach(group: Group) -> tuple[Group, list[bytes]]:
    """The group as its record has it, and the chunks of its choices; without choices, itself and none.

    Raises `RecordError` unless all samples have choices of one shape for every fed token, or none has any.
    """
    if all(sample.routed is None for sample in group.samples):
        return group, []
    choices = np.concatenate(_choices(group))
    step = _rows_of_chunk(*choices.shape[1:])
    parts = [choices[start : start + step] for start in range(0, len(choices), step)]
    chunks = [_encode(group.id, number, part) for number, part in enumerate(parts)]
    reference = Routed(choices.shape[1], choices.shape[2], len(chunks))
    samples = [msgspec.structs.replace(sample, routed=None) for sample in group.samples]
    return msgspec.structs.replace(group, samples=samples, routed=reference), chunks


def attach(group: Group, chunks: Sequence[bytes | None], *, entry: str = "?") -> Group:
    """The group with its samples' choices, from the chunks that its record refers to.

    Raises `RecordError` naming the chunk that is gone (field `payload`), damaged or another group's, or what
    the record says that cannot be.
    """
    reference = group.routed
    if reference is None:
        problem = f"the record has none; actor {group.actor} did not return them"
        raise RecordError(problem, field="routed", entry=entry, group=group.id)
    counts = [len(sample.tokens) - 1 for sample in group.samples]
    step, total = _rows_of_chunk(reference.layers, reference.chosen), sum(counts)
    if reference.chunks != -(-total // step) or len(chunks) != reference.chunks:
        problem = f"got {len(chunks)} chunks, {reference.chunks} named, expected {-(-total // step)}"
        raise RecordError(problem, field="routed.chunks", entry=entry, group=group.id)
    shape = (reference.layers, reference.chosen)
    parts = [
        _decode(group.id, number, chunk, (min(step, total - number * step), *shape), entry)
        for number, chunk in enumerate(chunks)
    ]
    choices = np.concatenate(parts) if len(parts) != 1 else parts[0]
    own = np.split(choices, np.cumsum(counts)[:-1])
    samples = [
        msgspec.structs.replace(sample, routed=routed)
        for sample, routed in zip(group.samples, own, strict=True)
    ]
    return msgspec.structs.replace(group, samples=samples)


async def store(stream: AsyncStream, group: str, chunks: Sequence[bytes]) -> None:
    """Writes a group's chunks, before the group is published; again is the same. Raises `RedisFull`."""
    if not chunks:
        return
    await stream.patiently(lambda: stream.redis.hset(stream.key("routing"), group, len(chunks)))
    name = routed_key(stream.run, group, stream.shards)
    for number, chunk in enumerate(chunks):
        await stream.patiently(partial(stream.redis.hset, name, str(number), chunk))


async def discard(stream: AsyncStream, group: str) -> None:
    """Deletes the chunks of a group that was not taken."""
    await stream.patiently(lambda: stream.redis.delete(routed_key(stream.run, group, stream.shards)))
    await stream.patiently(lambda: stream.redis.hdel(stream.key("routing"), group))


def read_chunks(stream: Stream, group: Group) -> list[bytes | None]:
    """The chunks that a group's record refers to, in order; None for one that is gone."""
    if group.routed is None:
        return []
    name, count = routed_key(stream.run, group.id, stream.shards), group.routed.chunks

    def fetch() -> Any:
        with stream.redis.pipeline(transaction=False) as pipe:
            for number in range(count):
                pipe.hget(name, str(number))
            return pipe.execute()

    return list(stream.patiently(fetch))


def sweep_chunks(stream: Stream) -> int:
    """Deletes the chunks of groups that are neither leased nor in the ledger; of how many groups."""
    redis = stream.redis
    # In this order: a group that is leased, published or begun between two reads is in a later one.
    begun: Any = stream.patiently(lambda: redis.hkeys(stream.key("routing")))
    if not begun:
        return 0
    leased: Any = stream.patiently(lambda: redis.hvals(stream.key("leased")))
    held: Any = stream.patiently(lambda: redis.hkeys(stream.key("groups")))
    living = {msgspec.json.decode(lease)["group"] for lease in leased} | {name.decode() for name in held}
    gone = [group for group in (name.decode() for name in begun) if group not in living]
    for group in gone:
        stream.patiently(partial(redis.delete, routed_key(stream.run, group, stream.shards)))
        stream.patiently(partial(redis.hdel, stream.key("routing"), group))
    return len(gone)


def _rows_of_chunk(layers: int, chosen: int) -> int:
    return max(1, CHUNK_BYTES // (layers * chosen * 2))


def _choices(group: Group) -> list[np.ndarray]:
    """Of each sample; zeros for one without an answer, which nothing is trained of."""
    shape = next(sample.routed.shape[1:] for sample in group.samples if sample.routed is not None)
    found = []
    for index, sample in enumerate(group.samples):
        expected, routed = (len(sample.tokens) - 1, *shape), sample.routed
        if routed is None and not sample.answer_length:
            routed = np.zeros(expected, np.uint16)
        if routed is None or routed.dtype != np.uint16 or routed.shape != expected or len(shape) != 2:
            got = "none" if routed is None else f"{routed.dtype} {list(routed.shape)}"
            problem = f"got {got}, expected uint16 {list(expected)}: tokens less 1, layers, experts"
            raise RecordError(problem, field=f"samples[{index}].routed", group=group.id)
        found.append(routed)
    return found


def _encode(group: str, number: int, choices: np.ndarray) -> bytes:
    low, high = choices.astype(np.uint8), (choices >> 8).astype(np.uint8)
    return pack([msgspec.msgpack.encode((group, number)), low.reshape(-1).data, high.reshape(-1).data])


def _decode(
    group: str, number: int, chunk: bytes | None, shape: tuple[int, int, int], entry: str
) -> np.ndarray:
    size, field = int(np.prod(shape)), f"routed[{number}]"
    if not chunk:
        raise RecordError(
            f"chunk {number} of its routed experts is gone", field="payload", entry=entry, group=group
        )
    try:
        label, *planes = unpack(chunk, 3, entry=entry, limit=2 * size + _LABEL_BYTES)
    except RecordError as error:
        raise RecordError(f"{error.field}: {error.problem}", field=field, entry=entry, group=group) from error
    if bytes(label) != msgspec.msgpack.encode((group, number)):
        raise RecordError("it is another group's or out of place", field=field, entry=entry, group=group)
    if [len(plane) for plane in planes] != [size, size]:
        problem = f"got {[len(plane) for plane in planes]} bytes, expected {size} each"
        raise RecordError(problem, field=field, entry=entry, group=group)
    return _join(planes).reshape(shape)


def _join(planes: Sequence[Bytes]) -> np.ndarray:
    low, high = (np.frombuffer(plane, np.uint8) for plane in planes)
    whole = high.astype(np.uint16)
    whole <<= 8
    whole |= low
    return whole
