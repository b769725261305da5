"""A server that came back older than the learner: what the learner knows, and handing it in."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from buffer.batches import Manifest
from buffer.client import Call
from buffer.versions import Forked


class Known(msgspec.Struct):
    """What a learner keeps, and checkpoints, of its run: enough to bring an older server forward."""

    nonce: str
    """Random name of this very run; a server with another one is foreign."""
    lineage: int
    """Number of forks the run has been through."""
    head: int
    """The next step to assign."""
    tail: int
    """Position of the next prompt, as last heard."""
    version: int
    """The newest version committed, -1 for none."""
    checkpoint: int
    """Version of the latest committed checkpoint, 0 before the first."""
    covered: int
    """The last step that no restore asks for again, -1 for none."""
    manifests: dict[int, Manifest] = {}
    """By step, since the oldest checkpoint that is kept."""
    versions: dict[int, str] = {}
    """Digests by version, likewise."""

    def forget(self, before: int) -> None:
        """Drops what concerns steps and versions before this one."""
        self.manifests = {step: rows for step, rows in self.manifests.items() if step >= before}
        self.versions = {version: digest for version, digest in self.versions.items() if version >= before}


class Reconcile(Call[Forked], frozen=True):
    """Brings a server that came back older forward; any other stays as it is.

    Groups assigned or trained since are so again, those that can no longer be met are `lost`. Raises
    `ForeignRun` (wiped or swapped), `Fenced`, or `LostSteps` if the server is older than what is known.
    """

    function: ClassVar[str] = "reconcile"
    epoch: str
    """Epoch of the learner, which an older server need not know."""
    restarted: bool
    """Whether the server process is another one than before: leases nobody renews count as `lost`."""
    known: Known
    """What the server is brought forward to."""

    def arguments(self) -> list[Any]:
        """Numbers first; manifests and digests go as one JSON object."""
        known = self.known
        memory = msgspec.json.encode({"manifests": known.manifests, "versions": known.versions})
        return [
            self.epoch,
            known.nonce,
            int(self.restarted),
            known.lineage,
            known.head,
            known.version,
            known.checkpoint,
            known.covered,
            memory,
        ]
