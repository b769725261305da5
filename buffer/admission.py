"""Who may generate: leases.

A lease is granted only if every outstanding group can still meet its deadline, the last step that may
train it; a batch takes the earliest deadlines, and only if what is left can still be met. Staleness
then never exceeds eta and nothing is thrown away for its age: docs/staleness.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from buffer.client import Call
from buffer.prompts import decode_prompt
from buffer.schema import Prompt


class Lease(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Admit`: a lease, or the reason to wait."""

    status: str
    """`lease` or `wait`."""
    reason: str
    """Why there is no lease: `full` (the bound), `enough` (the run's end is covered), `no-prompts`,
    `memory` (no room for its payload), `slow` (its groups would come too late, others' do not),
    `no-weights` (nothing applied yet), `old-weights` (staler than the bound), `end` (the run is over)."""
    token: str
    """`<number>:<128 random bits>`, which every later call about the lease names; empty with `wait`."""
    group: str
    """Id of the group to be generated, see `buffer.schema.group_id`; empty with `wait`."""
    position: int
    """Position of the prompt in the run's prompt queue, from 0; 0 with `wait`."""
    attempt: int
    """How many leases of this prompt ended without a group before; 0 with `wait`."""
    version: int
    """The version the actor served at admission; the group may not be older."""
    deadline: int
    """The last step that may train the group."""
    prompt: Prompt | None = None
    """What to answer; None with `wait`."""


class Admit(Call[Lease], frozen=True):
    """Asks for one lease."""

    function: ClassVar[str] = "admit"
    actor: str
    """Name under which the actor joined."""
    epoch: str
    """Epoch of that join, see `Joined.epoch`; any other is fenced."""
    request: int
    """Number of the request, rising; the same number again returns the first answer."""
    random: str
    """128 random bits in hex, of which the lease's token is made."""

    @classmethod
    def answer(cls, raw: Any) -> Lease:
        """Of the two parts of the reply: the lease, and its prompt if there is one."""
        meta, record = raw
        lease = msgspec.msgpack.decode(meta, type=Lease)
        return msgspec.structs.replace(lease, prompt=decode_prompt(record)) if record else lease


class Dropped(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Drop`."""

    dropped: bool
    """False if the lease was gone already."""


class Drop(Call[Dropped], frozen=True):
    """Hands a lease back: `released`, `engine`, `reward`, `poison`, or with dynamic sampling `filtered`."""

    function: ClassVar[str] = "drop"
    actor: str
    """Name of the actor that holds the lease."""
    epoch: str
    """Epoch under which it joined."""
    token: str
    """Token of the lease; one that is none any more changes nothing."""
    reason: str
    """One of those above, under which the ledger counts the group."""
