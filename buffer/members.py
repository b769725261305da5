"""Who takes part in a run: joining, heartbeats, serving a version, leaving."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

import msgspec

from buffer.client import Call
from buffer.config import StreamConfig
from buffer.schema import SCHEMA_VERSION


class Rules(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """The settings of a run as Redis keeps them; only a fork changes them."""

    batch: int
    """B, groups a step."""
    eta: int
    """The staleness bound in steps."""
    max_steps: int
    """Steps of the run, numbered from 0: it ends when the last is trained."""
    group_size: int
    """G, samples a group."""
    lease_ms: int
    """How long a lease lives without a heartbeat, milliseconds on the run's clock."""
    attempts_max: int
    """Leases of one prompt after which it is retired."""
    policy: str = "wait"
    """What is done about late groups: `wait` for them, or `drop` them."""
    cap: int
    """Groups admitted a step: B, more with over-sampling."""
    lease_max_ms: int = 0
    """No lease lives longer, renewed or not; 0: ten times the p99 of group times, at least six leases."""
    uncovered_max: int = 0
    """Steps that may be assigned beyond the last checkpoint; 0: no bound."""
    bytes_limit: int = 0
    """Payload bytes, stored and to come, up to which leases are granted; 0: no bound."""
    dynamic: int = 0
    """1 if groups with equal rewards are dropped as `filtered`."""
    schema: int = SCHEMA_VERSION
    """Version of the records' layout."""
    shards: int = 0
    """Payload streams beside the run's slot; 0: one in it."""

    @classmethod
    def of(cls, config: StreamConfig) -> Rules:
        """The rules of a configuration."""
        return cls(
            batch=config.groups_per_step,
            eta=config.max_staleness,
            max_steps=config.max_steps,
            group_size=config.group_size,
            lease_ms=int(config.lease_s * 1000),
            attempts_max=config.attempts,
            policy=config.late,
            cap=ceil(config.oversample * config.groups_per_step),
            lease_max_ms=int(config.lease_max_s * 1000),
            uncovered_max=config.uncovered_max,
            bytes_limit=config.payload_mib << 20,
            dynamic=int(config.dynamic_sampling),
            shards=config.shards,
        )

    @classmethod
    def held(cls, state: Mapping[str, str]) -> Rules:
        """The rules in a run's `buffer.ledger.Ledger.state`."""
        return msgspec.convert([state[name] for name in cls.__struct_fields__], cls, strict=False)


FIELDS = {
    "batch": "groups_per_step",
    "eta": "max_staleness",
    "lease_ms": "lease_s",
    "attempts_max": "attempts",
    "policy": "late",
    "cap": "oversample",
    "lease_max_ms": "lease_max_s",
    "bytes_limit": "payload_mib",
    "dynamic": "dynamic_sampling",
}
"""Rules that are not called as their field in `buffer.config.StreamConfig` is."""


class Joined(msgspec.Struct, array_like=True, frozen=True):
    """Answer of the joins: the epoch to write under, and where the run stands."""

    epoch: str
    """`<number>:<128 random bits>`; compared for equality, since numbers come back with an older server."""
    nonce: str
    """Random name of this very run; another one means a wiped or foreign Redis."""
    lineage: int
    """Number of forks the run has been through, 0 for none."""
    head: int
    """The next step to assign."""
    version: int
    """The newest committed version, -1 before the first."""
    tail: int
    """Position of the next prompt to feed."""
    checkpoint: int
    """Version of the latest committed checkpoint, 0 before the first."""
    covered: int
    """The last step whose payloads are deleted, -1 before the first."""
    data_end: int
    """Where the data ends, as a position; -1 while that is not known."""


class JoinLearner(Call[Joined], frozen=True):
    """Becomes the learner of the run, which is created if it does not exist; fences any earlier one."""

    function: ClassVar[str] = "join"
    random: str
    """128 random bits in hex; a repeat with the same bits is the same join."""
    nonce: str
    """Random name for the run if it is created; one that exists keeps its own."""
    rules: Rules
    """Settings of the new run; refused if they are not those of one that exists."""

    def arguments(self) -> list[Any]:
        """The rules come last, in the order of their fields."""
        return ["learner", self.random, self.nonce, *msgspec.structs.astuple(self.rules)]


class JoinActor(Call[Joined], frozen=True):
    """Becomes the actor `name`; it gets no lease before it has said `Applied`."""

    function: ClassVar[str] = "join"
    random: str
    """128 random bits in hex; a repeat with the same bits is the same join."""
    name: str
    """Unique in the run: an earlier actor of this name is fenced and its leases are released."""
    host: str
    """Name of its machine, for display."""
    schema: int = SCHEMA_VERSION
    """Version of the records' layout that it writes; refused if it is not the run's."""

    def arguments(self) -> list[Any]:
        """The role goes before the fields."""
        return ["actor", *msgspec.structs.astuple(self)]


class JoinRecorder(Call[Joined], frozen=True):
    """Becomes the recorder `name`: payloads stay until it has them, as long as it says that it lives."""

    function: ClassVar[str] = "join"
    random: str
    """128 random bits in hex; a repeat with the same bits is the same join."""
    name: str
    """Unique in the run: an earlier recorder of this name is fenced."""

    def arguments(self) -> list[Any]:
        """The role goes before the fields."""
        return ["recorder", *msgspec.structs.astuple(self)]


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Heartbeat`."""

    head: int
    """The next step to assign."""
    version: int
    """The newest committed version, -1 before the first."""
    over: bool
    """No more leases will come: every step is assigned, or a stop was asked for."""
    ended: str
    """Why the learner ended the run, empty while it goes on: the actor leaves."""
    lost: list[str]
    """Tokens that are no longer leases: stop working on them."""


class Heartbeat(Call[Beat], frozen=True):
    """Renews the leases it lists, and no others, and keeps the actor's record fresh."""

    function: ClassVar[str] = "heartbeat"
    actor: str
    """Name under which the actor joined."""
    epoch: str
    """Epoch of that join; any other is fenced."""
    state: str
    """`starting`, `running`, `draining`."""
    stats: str
    """A flat JSON object of figures for `launch status`."""
    tokens: tuple[str, ...]
    """Tokens of the leases it works on."""

    def arguments(self) -> list[Any]:
        """The role goes before the fields."""
        return ["actor", *super().arguments()]


class Standing(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `LearnerBeat` and `RecorderBeat`: where the run stands."""

    head: int
    """The next step to assign."""
    version: int
    """The newest committed version, -1 before the first."""
    covered: int
    """The last step whose payloads are gone."""
    ended: str
    """Why the learner ended the run, empty while it goes on."""


class LearnerBeat(Call[Standing], frozen=True):
    """Lets the run's clock advance, also while the learner trains or waits."""

    function: ClassVar[str] = "heartbeat"
    epoch: str
    """Epoch of the learner; any other is fenced."""

    def arguments(self) -> list[Any]:
        """The role goes before the epoch."""
        return ["learner", self.epoch]


class RecorderBeat(Call[Standing], frozen=True):
    """The recorder has everything up to `step`."""

    function: ClassVar[str] = "heartbeat"
    name: str
    """Name under which the recorder joined."""
    epoch: str
    """Epoch of that join; any other is fenced."""
    step: int
    """The last step that it has whole, -1 for none."""

    def arguments(self) -> list[Any]:
        """The role goes before the fields."""
        return ["recorder", *super().arguments()]


class Serving(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Applied`: what the actor now counts as serving."""

    version: int
    """Newer than the one said if the engine was already further."""
    digest: str
    """Of that version, as committed."""


class Applied(Call[Serving], frozen=True):
    """The actor's engine serves this version; refused unless the digest is the committed one.

    Under one epoch the version never goes back: an older one changes nothing.
    """

    function: ClassVar[str] = "applied"
    actor: str
    """Name under which the actor joined."""
    epoch: str
    """Epoch of that join; any other is fenced."""
    version: int
    """Number of the version, from 0."""
    digest: str
    """Digest of its exported weights, see `weightsync.manifest`."""


class Left(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Leave`."""

    released: int
    """Leases that were handed back."""


class Leave(Call[Left], frozen=True):
    """An `actor` or `recorder` is gone (`name` is its name), or the `learner` ends the run (the reason)."""

    function: ClassVar[str] = "leave"
    role: str
    """`actor`, `recorder` or `learner`."""
    name: str
    """Of the actor or recorder; of the learner why the run ends, such as `done`."""
    epoch: str
    """Epoch under which it joined; any other is fenced."""
