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
    group: str
    position: int
    attempt: int
    version: int
    """The version the actor served at admission; the group may not be older."""
    deadline: int
    """The last step that may train the group."""
    prompt: Prompt | None = None


class Admit(Call[Lease], frozen=True):
    """Asks for one lease."""

    function: ClassVar[str] = "admit"
    actor: str
    epoch: str
    request: int
    """Number of the request, rising; the same number again returns the first answer."""
    random: str

    @classmethod
    def answer(cls, raw: Any) -> Lease:
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
    epoch: str
    token: str
    reason: str
