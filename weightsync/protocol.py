"""What the learner asks of an actor's weight worker, by mail in Redis (`{run}:mail:<actor>`).

learner                         actor                       engine
Offer(version, sources)   ----> stage: pull, verify         goes on generating
                                apply: a ticket ----------> copies the staged bytes, reports
                                Applied(version, digest) -> Redis
Score(sequences)          ----> POST generate -----------> log-probabilities
                                Scores -------------------> Redis

and with the stock transport, instead of the offer:

JoinGroup(group, address) ----> POST init_weights_group --> rendezvous with the learner
Receive(group, manifest)  ----> POST update_weights ------> receives the broadcast, then serves it
                                Applied(version, digest) -> Redis
"""

from __future__ import annotations

import msgspec

from weightsync.manifest import Manifest


class Source(msgspec.Struct, frozen=True):
    """Where a version can be had."""

    kind: str
    """The transport: `cuda_ipc`, `nccl`, `shm`, `peer`, `disk`, `gloo` or `delta`."""
    host: str
    """Identity of the host it is on; empty: of no host in particular."""
    address: str
    """A path, or a URL."""
    token: str = ""
    """What a holder asks of who pulls from it."""


class Offer(msgspec.Struct, tag="offer", frozen=True):
    """A version may be staged; it may be applied once its digest is the committed one."""

    actor_epoch: str
    """Epoch of the actor this was written for; a later one ignores it."""
    version: int
    """Number of the version, from 0."""
    digest: str
    """Digest of its exported weights."""
    lineage: int
    """A fork makes a new one, in which versions may go back."""
    epoch: int
    """Number of the learner's epoch."""
    manifest: str
    """Digest of the manifest as it travels."""
    sources: list[Source]
    """Where it can be had; the actor tries those it can reach, by its own order of transports."""

    @property
    def label(self) -> str:
        """As `Manifest.label`."""
        return f"{self.version}:{self.digest}"

    @property
    def place(self) -> tuple[int, int, int]:
        """What decides which of two offers is the newer one."""
        return self.epoch, self.lineage, self.version


class JoinGroup(msgspec.Struct, tag="join", frozen=True):
    """Meet the learner in a two-rank group; the engine is rank 1."""

    actor_epoch: str
    """Epoch of the actor this was written for; a later one ignores it."""
    group: str
    """Name of the group, never used before."""
    address: str
    """Host on which the learner, rank 0, waits."""
    port: int
    """TCP port there."""


class Receive(msgspec.Struct, tag="receive", frozen=True):
    """Receive a version through the group and serve it."""

    actor_epoch: str
    """Epoch of the actor this was written for; a later one ignores it."""
    group: str
    """Name of a group joined before."""
    manifest: Manifest
    """Which version it is, and its tensors."""


class Score(msgspec.Struct, tag="score", frozen=True):
    """Say the log-probabilities of these token sequences under the version now served."""

    actor_epoch: str
    """Epoch of the actor this was written for; a later one ignores it."""
    request: str
    """Random name of the question, which the answer repeats."""
    sequences: list[list[int]]
    """Token ids; the first of each is given and not scored."""


class Scores(msgspec.Struct, frozen=True):
    """Answer to `Score`."""

    request: str
    """That of the `Score` it answers."""
    label: str
    """Label of the version that scored, see `Manifest.label`."""
    logprobs: list[list[float]]
    """Of tokens 1.. of each sequence."""


Request = Offer | JoinGroup | Receive | Score


def encode_request(request: Request) -> bytes:
    """The mail of a request."""
    return msgspec.json.encode(request)


def decode_request(mail: bytes) -> Request:
    """The request of a mail."""
    return msgspec.json.decode(mail, type=Request)
