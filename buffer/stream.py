"""Payloads: publishing a group, reading groups by entry id, deleting what nothing refers to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec

from buffer.batches import Assignment
from buffer.client import LIBRARY, PublishCall, Stream
from buffer.codec import decode
from buffer.errors import RecordError
from buffer.keys import shard_key
from buffer.routed import attach, read_chunks, sweep_chunks
from buffer.schema import Group

ORPHAN_S = 60.0
"""A payload without a ledger entry for this long belongs to no publish under way."""


class Published(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Publish`."""

    status: str
    """`ok` (also for a repeat); `late`: the lease is gone; `refused`: the group is not what the lease
    allows, and its prompt was put back."""
    reason: str
    """Why not `ok`: `fenced`, `unknown`, `duplicate` or `engine`; `repeat` if ok before, else empty."""
    entry: str
    """Entry id of the payload, empty unless ok."""


class Publish(PublishCall[Published], frozen=True):
    """Hands in the group of a lease. Its version_min must be at least the lease's version and every
    digest a committed one."""

    function: ClassVar[str] = "publish"
    actor: str
    """Name of the actor that holds the lease."""
    epoch: str
    """Epoch under which it joined."""
    token: str
    """Token of the lease, which the call ends."""
    size: int
    """Bytes of the payload and of the routed experts beside it."""
    version_min: int
    """The oldest version that wrote tokens of the group."""
    versions: tuple[str, ...]
    """`number:digest` of each version in the group's table."""
    tokens: int = 0
    """Tokens that training the group feeds, by which it is dealt to ranks."""

    def arguments(self) -> list[Any]:
        """The versions come last, as many as there are."""
        head = [self.actor, self.epoch, self.token, self.group, self.size, self.tokens, self.entry]
        return [*head, self.version_min, *self.versions]

    @classmethod
    def of(cls, group: Group, *, epoch: str, token: str, size: int) -> Publish:
        """The call for a group generated under a lease, encoded to `size` bytes."""
        versions = tuple(f"{version.number}:{version.digest}" for version in group.versions)
        tokens = sum(len(sample.tokens) - 1 for sample in group.samples)
        return cls(group.id, "", group.actor, epoch, token, size, group.version_min, versions, tokens)


class Frame(msgspec.Struct, frozen=True):
    """What a reader finds of a group: the group, or why there is none."""

    row: Assignment
    """What the manifest says of it."""
    payload: bytes
    """The bytes as stored, empty if they are gone."""
    group: Group | None
    """None: there is a problem."""
    problem: RecordError | None
    """What is wrong with the record; its field is `payload` if the bytes are gone."""
    chunks: tuple[bytes, ...] = ()
    """The routed experts as stored, if they were read and are whole."""

    @property
    def reason(self) -> str:
        """The reason of a strike: `lost` if the payload or part of it is gone, else `poison`."""
        gone = self.problem is not None and self.problem.field == "payload"
        return "lost" if gone else "poison"


def read_frames(stream: Stream, rows: Sequence[Assignment], *, routed: bool = False) -> list[Frame]:
    """Each row's payload, in order, read by entry id in one round trip (a node), and decoded.

    `routed`: with the routed experts, in one more round trip a group; one that has none is a problem, too.
    """

    def fetch() -> list[Any]:
        with stream.redis.pipeline(transaction=False) as pipe:
            for row in rows:
                name, identity = stream.locate(row.entry)
                pipe.execute_command("XRANGE", name, identity, identity)
            return pipe.execute()

    found = stream.patiently(fetch)
    frames = [_frame(row, entries) for row, entries in zip(rows, found, strict=True)]
    return [with_routed(stream, frame) for frame in frames] if routed else frames


def with_routed(stream: Stream, frame: Frame) -> Frame:
    """The frame with its group's routed experts, or with the problem there is with them."""
    if frame.group is None:
        return frame
    try:
        chunks = read_chunks(stream, frame.group)
        group = attach(frame.group, chunks, entry=frame.row.entry)
    except RecordError as problem:
        return msgspec.structs.replace(frame, group=None, problem=problem)
    whole = tuple(chunk for chunk in chunks if chunk is not None)
    return msgspec.structs.replace(frame, group=group, chunks=whole)


def _frame(row: Assignment, entries: Any) -> Frame:
    payload = entries[0][1].get(b"g", b"") if entries else b""
    try:
        if not payload:
            raise RecordError("no such entry", field="payload", entry=row.entry, group=row.group)
        group = decode(payload, entry=row.entry)
        if group.id != row.group:
            raise RecordError(f"holds {group.id}", field="id", entry=row.entry, group=row.group)
        if group.version_min != row.version_min:
            problem = f"got {group.version_min} as the oldest, it was published with {row.version_min}"
            raise RecordError(problem, field="versions", entry=row.entry, group=row.group)
    except RecordError as problem:
        return Frame(row, payload, None, problem)
    return Frame(row, payload, group, None)


def sweep(stream: Stream) -> int:
    """Deletes payloads that nothing refers to: the shards' trash, orphans of broken-off publishes, and the
    routed experts of groups that are done with.

    Returns how many payloads. Meant for the learner, now and then; a second sweep at the same time does no
    harm.
    """
    redis, trash_key = stream.redis, stream.key("trash")
    trash = stream.patiently(lambda: redis.lrange(trash_key, 0, 999))
    for entry in trash:
        name, identity = stream.locate(entry.decode())
        stream.patiently(partial(redis.xdel, name, identity))
    if trash:
        # Should a lost reply make this trim twice, what it trims in vain is swept as an orphan.
        stream.patiently(lambda: redis.ltrim(trash_key, len(trash), -1))
    sweep_chunks(stream)
    return len(trash) + sum(_sweep_orphans(stream, shard) for shard in range(max(1, stream.shards)))


def _sweep_orphans(stream: Stream, shard: int) -> int:
    name = shard_key(stream.run, shard) if stream.shards else stream.key("stream")
    # The groups are read after the entries: one that is published in between is in both.
    aged_ms = int(ORPHAN_S * 1000)
    aged = stream.patiently(
        lambda: stream.redis.execute_command("FCALL_RO", f"{LIBRARY}_aged", 1, name, aged_ms)
    )
    groups = stream.patiently(lambda: stream.redis.hvals(stream.key("groups")))
    prefix = f"{shard}/" if stream.shards else ""
    known = {msgspec.json.decode(row)["entry"] for row in groups}
    orphans = [entry for entry in aged if prefix + entry.decode() not in known]
    if orphans:
        stream.patiently(lambda: stream.redis.xdel(name, *orphans))
    return len(orphans)
