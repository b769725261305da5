"""Payloads: publishing a group, reading groups by entry id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from buffer.admission import Assignment
from buffer.client import PublishCall, Stream
from buffer.codec import decode
from buffer.errors import RecordError
from buffer.schema import Group


class Published(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Publish`."""

    status: str
    """`ok` (also for a repeat); `late`: the lease is gone; `refused`: the group is not what the lease
    allows, and its prompt was put back."""
    reason: str
    entry: str
    """Entry id of the payload, empty unless ok."""


class Publish(PublishCall[Published], frozen=True):
    """Hands in the group of a lease. Its version_min must be at least the lease's version and every
    digest a committed one."""

    function: ClassVar[str] = "publish"
    actor: str
    epoch: str
    token: str
    group: str
    version_min: int
    versions: tuple[str, ...]
    """`number:digest` of each version in the group's table."""

    @classmethod
    def of(cls, group: Group, *, epoch: str, token: str) -> Publish:
        """The call for a group generated under a lease."""
        versions = tuple(f"{version.number}:{version.digest}" for version in group.versions)
        return cls(group.actor, epoch, token, group.id, group.version_min, versions)


def read_groups(stream: Stream, rows: Sequence[Assignment]) -> list[Group]:
    """The groups of a manifest, in its order, read by entry id in one round trip.

    Raises `RecordError` for a payload that is missing, does not decode or is another group's.
    """
    with stream.redis.pipeline(transaction=False) as pipe:
        for row in rows:
            pipe.xrange(stream.key("stream"), row.entry, row.entry)
        found = pipe.execute()
    groups = []
    for row, entries in zip(rows, found, strict=True):
        if not entries:
            raise RecordError("no such entry", field="payload", entry=row.entry, group=row.group)
        group = decode(entries[0][1][b"g"], entry=row.entry)
        if group.id != row.group:
            raise RecordError(f"holds {group.id}", field="id", entry=row.entry, group=row.group)
        groups.append(group)
    return groups
