"""Who may generate, and what is trained next: joining, leases, batches.

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


class Joined(msgspec.Struct, array_like=True, frozen=True):
    """Answer of the joins: the epoch to write under, and where the run stands."""

    epoch: str
    nonce: str
    """Random name of this very run; another one means a wiped or foreign Redis."""
    lineage: int
    head: int
    """The next step to assign."""
    version: int
    """The newest committed version, -1 before the first."""
    tail: int
    """Position of the next prompt to feed."""


class JoinLearner(Call[Joined], frozen=True):
    """Becomes the learner of the run, which is created if it does not exist; fences any earlier one."""

    function: ClassVar[str] = "join"
    random: str
    """128 random bits in hex; a repeat with the same bits is the same join."""
    nonce: str
    batch: int
    """B, groups a step."""
    eta: int
    """The staleness bound in steps."""
    max_steps: int
    group_size: int
    """G, samples a group."""
    lease_ms: int
    """How long a lease lives without a heartbeat, milliseconds on the run's clock."""
    attempts_max: int
    """Leases of one prompt after which it is retired."""

    def arguments(self) -> list[Any]:
        return ["learner", *msgspec.structs.astuple(self)]


class JoinActor(Call[Joined], frozen=True):
    """Becomes the actor `name`; it gets no lease before it has said `Applied`."""

    function: ClassVar[str] = "join"
    random: str
    name: str
    host: str

    def arguments(self) -> list[Any]:
        return ["actor", *msgspec.structs.astuple(self)]


class Lease(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Admit`: a lease, or the reason to wait."""

    status: str
    """`lease` or `wait`."""
    reason: str
    """Why there is no lease: `full` (the bound), `enough` (the run's end is covered), `no-prompts`,
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
    """Number of the request; the same number again returns the first answer."""
    random: str

    @classmethod
    def answer(cls, raw: Any) -> Lease:
        meta, record = raw
        lease = msgspec.msgpack.decode(meta, type=Lease)
        return msgspec.structs.replace(lease, prompt=decode_prompt(record)) if record else lease


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Heartbeat`."""

    head: int
    version: int
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
    epoch: str
    state: str
    """`starting`, `running`, `draining`."""
    stats: str
    """A flat JSON object of figures for `launch status`."""
    tokens: tuple[str, ...]


class Dropped(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Drop`."""

    dropped: bool
    """False if the lease was gone already."""


class Drop(Call[Dropped], frozen=True):
    """Hands a lease back: `released`, `engine`, `reward` or `poison`."""

    function: ClassVar[str] = "drop"
    actor: str
    epoch: str
    token: str
    reason: str


class Assigned(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Assign`."""

    status: str
    """`batch`, `wait` or `end`."""
    reason: str
    """Why to wait: `few` (fewer than B are ready) or `unsafe` (an earlier deadline is still leased)."""
    manifest: str
    """JSON of `Manifest`, for a batch."""
    ready: int
    """Groups still queued after this call."""

    def groups(self) -> list[Assignment]:
        """The rows of the manifest, in canonical order (by group id)."""
        return sorted(msgspec.json.decode(self.manifest, type=list[Assignment]))


class Assignment(msgspec.Struct, array_like=True, frozen=True, order=True):
    """A row of a manifest."""

    group: str
    entry: str
    """Entry id of the payload in the replay stream."""
    version_min: int


class Assign(Call[Assigned], frozen=True):
    """The batch of a step: at the head the earliest-deadline one, below it the stored manifest."""

    function: ClassVar[str] = "assign"
    epoch: str
    step: int
