"""What happened to every group: the snapshot that accounts for all of them, and what must hold in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec

from buffer.batches import Manifest
from buffer.client import Call


class ActorRecord(msgspec.Struct, frozen=True):
    """What Redis knows of an actor."""

    epoch: str
    """Epoch under which it joined last, see `Joined.epoch`."""
    version: int
    """The version its engine serves, -1 for none."""
    state: str
    """As in its last heartbeat: `starting`, `running` or `draining`."""
    beat: int
    """Last heartbeat, ms on the run's clock."""
    host: str
    """Name of the machine, as the actor gave it."""
    stats: dict[str, Any] = {}
    """Figures of its last heartbeat, for `launch status`; empty before the first."""


class Counts(msgspec.Struct, frozen=True):
    """The ledger at one instant, in groups."""

    admitted: int = 0
    """Leases ever granted."""
    leased: int = 0
    """Their lease is open."""
    queued: int = 0
    """Published, in no batch yet."""
    assigned: int = 0
    """In the manifest of a step that is not committed yet."""
    trained: int = 0
    """In a committed step, struck ones apart."""
    dropped: dict[str, int] = {}
    """By reason."""
    refused: dict[str, int] = {}
    """Late or fenced publishes, by reason; never admitted twice, so outside the identity."""
    dead: dict[str, int] = {}
    """Dead letters ever written, by reason."""
    rollbacks: int = 0
    """Times the server came back older and was brought forward."""

    @property
    def conserved(self) -> bool:
        """admitted = leased + queued + assigned + trained + dropped."""
        held = self.leased + self.queued + self.assigned + self.trained + sum(self.dropped.values())
        return self.admitted == held


class HeldLease(msgspec.Struct, frozen=True):
    """A lease as Redis keeps it."""

    group: str
    """Id of the group that it allows."""
    position: int
    """Position of its prompt in the prompt queue, from 0."""
    attempt: int
    """How many leases of this prompt ended without a group before."""
    actor: str
    """Name of the actor that holds it."""
    version: int
    """The version its actor served at admission."""
    deadline: int
    """The last step that may train the group."""
    born: int
    """When it was granted, ms on the run's clock."""
    probe: bool = False
    """Whether it is a slow actor's, to see if it still is slow."""
    suspect: bool = False
    """Whether it is from before the server restarted, and nobody has renewed it since."""


class Ledger(msgspec.Struct, frozen=True):
    """A run at one instant."""

    state: dict[str, str]
    """Settings, head, version, clock and the like by name, as text: see `number`."""
    counts: Counts
    """How many groups are where."""
    staleness: dict[int, int]
    """Trained groups by staleness in steps."""
    actors: dict[str, ActorRecord]
    """By name, those that left apart."""
    outstanding: dict[int, int]
    """Groups leased or queued, by deadline."""
    progress: dict[str, str]
    """Figures of the newest step by name, as text; empty before the first."""
    sizes: dict[str, int]
    """Lengths: prompts, leases, ready, groups, payloads, dead, trash, forks; `stopping` is 1 once a stop was
    asked for."""
    leased: list[HeldLease] = []
    """Every lease; only in a full snapshot, as the next two."""
    ready: dict[str, int] = {}
    """Every queued group and its deadline."""
    manifests: dict[int, Manifest] = {}
    """The manifests that are kept, by step."""

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
    verb: ClassVar[str] = "FCALL_RO"
    full: bool = False
    """Also every lease, queued group and manifest."""

    def arguments(self) -> list[Any]:
        """`full`, or nothing."""
        return ["full"] if self.full else []

    @classmethod
    def answer(cls, raw: Any) -> Ledger:
        """Of the reply's ten parts, flat lists of fields and values: the ledger."""
        state, counts, staleness, actors, outstanding, progress, sizes = map(_pairs, raw[:7])
        split: dict[str, Any] = {"dropped": {}, "refused": {}, "dead": {}}
        for name, count in counts.items():
            kind, _, reason = name.partition(":")
            if reason:
                split[kind][reason] = int(count)
            else:
                split[kind] = int(count)
        split["dropped"] = {reason: count for reason, count in split["dropped"].items() if count}
        return Ledger(
            state=state,
            counts=Counts(**split),
            staleness={int(steps): int(count) for steps, count in sorted(staleness.items()) if int(count)},
            actors={name: msgspec.json.decode(actors[name], type=ActorRecord) for name in sorted(actors)},
            outstanding={int(deadline): int(count) for deadline, count in outstanding.items()},
            progress=progress,
            sizes={name: int(size) for name, size in sizes.items()},
            leased=[msgspec.json.decode(lease, type=HeldLease) for lease in raw[7]],
            ready={group: int(deadline) for group, deadline in _pairs(raw[8]).items()},
            manifests={
                int(step): msgspec.json.decode(manifest, type=Manifest)
                for step, manifest in _pairs(raw[9]).items()
            },
        )


def violations(ledger: Ledger) -> list[str]:
    """What does not hold in a full snapshot, one line each; none in a sound run.

    Conservation, the staleness bound of what was trained, and, under `wait`, that all that is outstanding
    can still be met; that no group is in two manifests; and that the ledger's numbers are those of what is
    really there.
    """
    counts, head, eta = ledger.counts, ledger.number("head"), ledger.number("eta")
    found = [] if counts.conserved else [f"the ledger is not conserved: {msgspec.to_builtins(counts)}"]
    if "journal" in ledger.state:
        found.append(
            "a call broke off; its writes are pending until the next call of the learner or an actor"
        )
    if ledger.staleness and max(ledger.staleness) > eta:
        found.append(f"staleness {max(ledger.staleness)} was trained, the bound is {eta}")
    due = [lease.deadline for lease in ledger.leased] + list(ledger.ready.values())
    found += _unequal("outstanding groups by deadline", ledger.outstanding, dict(Counter(due)))
    found += _unequal("leased groups", counts.leased, len(ledger.leased))
    found += _unequal("queued groups", counts.queued, len(ledger.ready))
    horizon = eta if ledger.number("cap") == ledger.number("batch") else -1  # over-sampling may overflow
    for d in range(head, head + horizon + 1):
        out, room = sum(deadline <= d for deadline in due), (d - head + 1) * ledger.number("cap")
        if out > room:
            found.append(f"{out} groups are due by step {d}, which has room for {room}")
    rows = Counter(row.group for manifest in ledger.manifests.values() for row in manifest.rows)
    found += [f"group {group} is in {times} manifests" for group, times in rows.items() if times > 1]
    found += [f"group {group} is queued and assigned" for group in ledger.ready if group in rows]
    found += _stale_rows(ledger, eta)
    return found


def _stale_rows(ledger: Ledger, eta: int) -> list[str]:
    return [
        f"group {row.group} of step {step} has version_min {row.version_min}, more than {eta} steps older"
        for step, manifest in ledger.manifests.items()
        for row in manifest.rows
        if step - row.version_min > eta
    ]


def _unequal(what: str, ledger: object, counted: object) -> list[str]:
    return [] if ledger == counted else [f"{what}: the ledger says {ledger}, there are {counted}"]


def _pairs(flat: Iterable[Any]) -> dict[str, Any]:
    texts = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
