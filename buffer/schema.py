"""The record of the replay stream: one group, the G samples of one prompt.

Token ids and log-probabilities are NumPy arrays here; `buffer.codec` turns a group into bytes and
back. What absence means is said at each field.

Worked example: two samples of the prompt ``[5, 6]``, answered by ``[7, 8]`` and ``[9]``::

    group = Group(
        lineage=0, position=41, attempt=0, row=3, actor="actor-0", actor_epoch=1, temperature=1.0,
        versions=[Version(12, "9c41...")], started=0.0, finished=0.4,
        samples=[
            Sample(tokens=int32([5, 6, 7, 8]), prompt_length=2, logprobs=float32([-0.1, -0.7]), loss_runs=[2],
                   spans=[Span(2, 0)], reward=1.0, rewards={"correct": 1.0}, finish_reason="stop"),
            Sample(tokens=int32([5, 6, 9]), prompt_length=2, logprobs=float32([-2.3]), loss_runs=[1],
                   spans=[Span(1, 0)], reward=0.0, rewards={"correct": 0.0}, finish_reason="length"),
        ],
    )
    group.version_min   # 12
"""

from __future__ import annotations

import msgspec
import numpy as np

SCHEMA_VERSION = 2
"""Version of the record's layout. A reader refuses any other, naming both."""


class Version(msgspec.Struct, array_like=True, frozen=True):
    """A policy version that wrote tokens of a group."""

    number: int
    """v: the weights after v optimizer steps."""
    digest: str
    """Hex digest of the exported weights of that version (`weightsync.manifest.digest`)."""


class Span(msgspec.Struct, array_like=True, frozen=True):
    """A run of answer tokens that one version wrote."""

    length: int
    """Tokens in the run, at least 1."""
    version: int
    """Index into the group's table `versions`."""


class Sample(msgspec.Struct, array_like=True, eq=False):
    """One rollout: prompt and answer, with what the behaviour policy said of the answer."""

    tokens: np.ndarray
    """int32 [T]: prompt ids, then answer ids."""
    prompt_length: int
    """P, with 0 < P <= T: how many of `tokens` are the prompt."""
    logprobs: np.ndarray
    """float32 [T - P]: log-probability of each answer token under the behaviour policy, natural
    logarithm, over the full vocabulary after temperature."""
    loss_runs: list[int]
    """The loss mask over the answer as run lengths, alternating, beginning with trained tokens
    (a first 0 means that the answer begins with masked ones); they sum to T - P."""
    spans: list[Span]
    """Which version wrote which answer tokens, in order; lengths sum to T - P."""
    reward: float
    """Scalar reward, finite."""
    rewards: dict[str, float]
    """The reward's named parts before weighting; empty when the function returned only a scalar."""
    finish_reason: str
    """`stop` (end of sequence or stop token) or `length` (token limit)."""
    routed: np.ndarray | None = None
    """uint16 [T - 1, L, k]: the k experts of each of L layers that the engine sent every token to but the
    last, which it never fed; zeros for layers without experts. Never in the record, see `buffer.routed`;
    absent: not returned by the engine, or not fetched."""

    @property
    def answer_length(self) -> int:
        """T - P, the number of answer tokens."""
        return len(self.tokens) - self.prompt_length

    def loss_mask(self) -> np.ndarray:
        """bool [T - P]: True where the token is trained.

        >>> s = Sample(np.zeros(6, "i4"), 1, np.zeros(5, "f4"), [2, 2, 1], [Span(5, 0)], 0.0, {}, "stop")
        >>> s.loss_mask().tolist()
        [True, True, False, False, True]
        """
        flags = np.arange(len(self.loss_runs)) % 2 == 0
        return np.repeat(flags, self.loss_runs)


class Routed(msgspec.Struct, array_like=True, frozen=True):
    """What a record says of its routed experts, which are kept beside it."""

    layers: int
    """L, layers of the model."""
    chosen: int
    """k, experts a token is sent to in a layer."""
    chunks: int
    """Pieces in which they are stored."""


class Group(msgspec.Struct, array_like=True, tag=True, eq=False):
    """The G samples of one prompt: what an actor publishes and a step trains."""

    lineage: int
    """Lineage of the lease under which it was generated."""
    position: int
    """Position of the prompt in the run's prompt queue, from 0."""
    attempt: int
    """How many leases of this prompt ended without a group before this one."""
    row: int
    """Row of the data set the prompt came from."""
    actor: str
    """Name of the actor."""
    actor_epoch: int
    """Epoch under which the actor had joined."""
    temperature: float
    """Sampling temperature, above 0; the learner divides its logits by it."""
    versions: list[Version]
    """The versions that wrote tokens of this group; spans index it."""
    started: float
    """When generation began, seconds since 1970 by the actor's clock; for timelines only."""
    finished: float
    """When the last sample had its reward, same clock; for timelines only."""
    samples: list[Sample]
    """G of them, those without a verdict included."""
    routed: Routed | None = None
    """The routed experts kept beside the record; absent: none."""

    @property
    def id(self) -> str:
        """The group id, see `group_id`."""
        return group_id(self.lineage, self.position, self.attempt)

    @property
    def version_min(self) -> int:
        """The oldest version that produced any token of the group."""
        return min(version.number for version in self.versions)


def group_id(lineage: int, position: int, attempt: int) -> str:
    """The id of a group, zero-padded so that text order is the order of the integers.

    >>> group_id(0, 41, 1)
    '0000-0000000041-01'
    """
    return f"{lineage:04d}-{position:010d}-{attempt:02d}"


class Prompt(msgspec.Struct, array_like=True, frozen=True):
    """An entry of the prompt queue: what a lease carries to an actor."""

    row: int
    """Row of the data set."""
    tokens: list[int]
    """Prompt token ids, tokenised by the learner."""
    answer: str
    """The gold answer as the data set gives it; the reward function reads it."""
