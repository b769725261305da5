"""What a step leaves behind: committed versions, checkpoints, and new lineages."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from buffer.client import Call
from buffer.members import Rules


class Committed(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Commit` and `CommitCheckpoint`."""

    version: int
    digest: str
    """The digest that counts: of a version committed before, that of then."""


class Commit(Call[Committed], frozen=True):
    """Step version - 1 is trained, and the weights after it have this digest. Version 0 trains nothing.

    Of a version that is committed already nothing changes; the answer says which digest counts.
    """

    function: ClassVar[str] = "commit"
    epoch: str
    version: int
    digest: str
    covered: int = -1
    """The last step that no restore can ask for again, -1 for none; its payloads are deleted."""
    struck: int = -1
    """Groups that the step trained without, if known: a server that knows of another number is behind."""

    def arguments(self) -> list[Any]:
        return ["version", *super().arguments()]


class CommitCheckpoint(Call[Committed], frozen=True):
    """A complete checkpoint of a committed version is the latest; payloads it and its elders cover go."""

    function: ClassVar[str] = "commit"
    epoch: str
    version: int
    digest: str
    oldest: int
    """Version of the oldest checkpoint that is kept."""

    def arguments(self) -> list[Any]:
        return ["checkpoint", *super().arguments()]


class Forked(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Fork`: where the new lineage stands."""

    lineage: int
    head: int
    version: int
    tail: int


class Fork(Call[Forked], frozen=True):
    """A new lineage from the weights of version `at`: later steps are undone, their prompts return.

    What is outstanding drops as `lineage`. The rules may be others than before.
    """

    function: ClassVar[str] = "fork"
    epoch: str
    lineage: int
    """The lineage that is left."""
    at: int
    reason: str
    rules: Rules

    def arguments(self) -> list[Any]:
        head = [self.epoch, self.lineage, self.at, self.reason]
        return [*head, *msgspec.structs.astuple(self.rules)]
