"""What a step leaves behind: committed versions, checkpoints, and new lineages."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from buffer.client import Call
from buffer.members import Rules


class Committed(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Commit` and `CommitCheckpoint`."""

    version: int
    """The version said; the newest committed one where that was committed before."""
    digest: str
    """The digest that counts: of a version committed before, that of then."""


class Commit(Call[Committed], frozen=True):
    """Step version - 1 is trained, and the weights after it have this digest. Version 0 trains nothing.

    Of a version that is committed already nothing changes; the answer says which digest counts.
    """

    function: ClassVar[str] = "commit"
    epoch: str
    """Epoch of the learner, see `Joined.epoch`."""
    version: int
    """The next one, or one that is committed already."""
    digest: str
    """Digest of its exported weights."""
    covered: int = -1
    """The last step that no restore can ask for again, -1 for none; its payloads are deleted."""
    struck: int = -1
    """Groups that the step trained without, if known: a server that knows of another number is behind."""

    def arguments(self) -> list[Any]:
        """`version` goes before the fields."""
        return ["version", *super().arguments()]


class CommitCheckpoint(Call[Committed], frozen=True):
    """A complete checkpoint of a committed version is the latest; payloads it and its elders cover go."""

    function: ClassVar[str] = "commit"
    epoch: str
    """Epoch of the learner, see `Joined.epoch`."""
    version: int
    """Optimizer steps behind the checkpoint's weights."""
    digest: str
    """Refused unless it is the one committed for that version."""
    oldest: int
    """Version of the oldest checkpoint that is kept."""

    def arguments(self) -> list[Any]:
        """`checkpoint` goes before the fields."""
        return ["checkpoint", *super().arguments()]


class Forked(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Fork`: where the new lineage stands."""

    lineage: int
    """Number of the lineage the run is in now."""
    head: int
    """The next step to assign."""
    version: int
    """The newest committed version."""
    tail: int
    """Position of the next prompt to feed."""


class Fork(Call[Forked], frozen=True):
    """A new lineage from the weights of version `at`: later steps are undone, their prompts return.

    What is outstanding drops as `lineage`. The rules may be others than before.
    """

    function: ClassVar[str] = "fork"
    epoch: str
    """Epoch of the learner, see `Joined.epoch`."""
    lineage: int
    """The lineage that is left."""
    at: int
    """Version to go on from, 0 up to the newest committed; the head becomes the same."""
    reason: str
    """For people: kept in the list of forks."""
    rules: Rules
    """Settings from here on."""

    def arguments(self) -> list[Any]:
        """The rules come last, in the order of their fields."""
        head = [self.epoch, self.lineage, self.at, self.reason]
        return [*head, *msgspec.structs.astuple(self.rules)]
