"""What happened to every group: commits, membership, and the snapshot that accounts for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec

from buffer.client import Call


class Committed(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Commit` and `Applied`."""

    version: int


class Commit(Call[Committed], frozen=True):
    """Step version - 1 is trained, and the weights after it have this digest. Version 0 trains nothing."""

    function: ClassVar[str] = "commit"
    epoch: str
    version: int
    digest: str
    covered: int
    """The last step that no restore can ask for again, -1 for none; its payloads are deleted."""


class Applied(Call[Committed], frozen=True):
    """The actor's engine serves this version; refused unless the digest is the committed one."""

    function: ClassVar[str] = "applied"
    actor: str
    epoch: str
    version: int
    digest: str


class Left(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Leave`."""

    released: int
    """Leases that were handed back."""


class Leave(Call[Left], frozen=True):
    """An actor is gone (`name` is its name), or the learner ends the run (`name` is the reason)."""

    function: ClassVar[str] = "leave"
    role: str
    name: str
    epoch: str


class ActorRecord(msgspec.Struct, frozen=True):
    """What Redis knows of an actor."""

    epoch: str
    version: int
    """The version its engine serves, -1 for none."""
    state: str
    beat: int
    """Last heartbeat, ms on the run's clock."""
    host: str
    stats: dict[str, Any] = {}


class Counts(msgspec.Struct, frozen=True):
    """The ledger at one instant, in groups."""

    admitted: int = 0
    leased: int = 0
    queued: int = 0
    assigned: int = 0
    trained: int = 0
    dropped: dict[str, int] = {}
    """By reason."""
    refused: dict[str, int] = {}
    """Late or fenced publishes, by reason; never admitted twice, so outside the identity."""

    @property
    def conserved(self) -> bool:
        """admitted = leased + queued + assigned + trained + dropped."""
        held = self.leased + self.queued + self.assigned + self.trained + sum(self.dropped.values())
        return self.admitted == held


class Ledger(msgspec.Struct, frozen=True):
    """A run at one instant."""

    state: dict[str, str]
    counts: Counts
    staleness: dict[int, int]
    """Trained groups by staleness in steps."""
    actors: dict[str, ActorRecord]
    outstanding: dict[int, int]
    progress: dict[str, str]
    sizes: dict[str, int]
    """Lengths: prompts, leases, ready, payloads, dead; `stopping` is 1 once a stop was asked for."""

    def number(self, name: str) -> int:
        """An integer of the state, such as `head`, `version`, `eta`."""
        return int(self.state[name])

    def silent_s(self, actor: str) -> float:
        """Seconds on the run's clock since the actor's last heartbeat."""
        return (self.number("clock") - self.actors[actor].beat) / 1000

    def alive(self, actor: str) -> bool:
        """Whether its last heartbeat is younger than a lease."""
        return self.silent_s(actor) * 1000 <= self.number("lease_ms")


class Snapshot(Call[Ledger], frozen=True):
    """The whole control state at one instant."""

    function: ClassVar[str] = "snapshot"

    @classmethod
    def answer(cls, raw: Any) -> Ledger:
        state, counts, staleness, actors, outstanding, progress, sizes = map(_pairs, raw)
        split: dict[str, Any] = {"dropped": {}, "refused": {}}
        for name, count in counts.items():
            kind, _, reason = name.partition(":")
            if reason:
                split[kind][reason] = int(count)
            else:
                split[kind] = int(count)
        return Ledger(
            state=state,
            counts=Counts(**split),
            staleness={int(steps): int(count) for steps, count in sorted(staleness.items())},
            actors={name: msgspec.json.decode(actors[name], type=ActorRecord) for name in sorted(actors)},
            outstanding={int(deadline): int(count) for deadline, count in outstanding.items()},
            progress=progress,
            sizes={name: int(size) for name, size in sizes.items()},
        )


def _pairs(flat: Iterable[Any]) -> dict[str, Any]:
    texts = [item.decode() if isinstance(item, bytes) else item for item in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
