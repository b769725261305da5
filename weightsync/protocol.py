"""What the learner asks of an actor's weight worker, by mail in Redis (`{run}:mail:<actor>`).

learner                         actor                       engine
JoinGroup(group, address) ----> POST init_weights_group --> rendezvous with the learner
Receive(group, manifest)  ----> POST update_weights ------> receives the broadcast, then serves it
                                Applied(version, digest) -> Redis
Score(sequences)          ----> POST generate -----------> log-probabilities
                                Scores -------------------> Redis
"""

from __future__ import annotations

import msgspec

from weightsync.manifest import Manifest


class JoinGroup(msgspec.Struct, tag="join", frozen=True):
    """Meet the learner in a two-rank group; the engine is rank 1."""

    actor_epoch: str
    """Epoch of the actor this was written for; a later one ignores it."""
    group: str
    """Name of the group, never used before."""
    address: str
    port: int


class Receive(msgspec.Struct, tag="receive", frozen=True):
    """Receive a version through the group and serve it."""

    actor_epoch: str
    group: str
    manifest: Manifest


class Score(msgspec.Struct, tag="score", frozen=True):
    """Say the log-probabilities of these token sequences under the version now served."""

    actor_epoch: str
    request: str
    sequences: list[list[int]]


class Scores(msgspec.Struct, frozen=True):
    """Answer to `Score`."""

    request: str
    label: str
    """Label of the version that scored, see `Manifest.label`."""
    logprobs: list[list[float]]
    """Of tokens 1.. of each sequence."""


Request = JoinGroup | Receive | Score


def encode_request(request: Request) -> bytes:
    """The mail of a request."""
    return msgspec.json.encode(request)


def decode_request(mail: bytes) -> Request:
    """The request of a mail."""
    return msgspec.json.decode(mail, type=Request)
