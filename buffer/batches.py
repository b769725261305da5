"""What is trained: manifests, and the strikes against records that cannot be read."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from buffer.client import Call


class Assignment(msgspec.Struct, array_like=True, frozen=True, order=True):
    """A row of a manifest."""

    group: str
    """Id of the group, see `buffer.schema.group_id`."""
    entry: str
    """Entry id of the payload in the replay stream, with shards `<shard>/<id>`."""
    version_min: int
    """The oldest version that wrote tokens of it; step minus this is its staleness."""
    size: int
    """Bytes of the payload and of what lies beside it."""
    tokens: int = 0
    """Tokens that training it feeds, prompts once a sample; 0 in manifests older than this figure."""


class Manifest(msgspec.Struct, frozen=True):
    """The groups of a step: a write-ahead log, from which a restored learner trains the same again."""

    rows: list[Assignment]
    """One a group, those struck since among them."""
    strikes: dict[str, str] = {}
    """Group that the step trains without -> why: `poison` (cannot be read) or `lost` (payload gone)."""

    def groups(self) -> list[Assignment]:
        """The rows that are trained, in canonical order (by group id)."""
        return sorted(row for row in self.rows if row.group not in self.strikes)

    def share(self, rank: int, ranks: int, mini_batches: int = 1) -> list[Assignment]:
        """The rows that one of `ranks` data-parallel readers fetches; every row belongs to one of them.

        The shares of each mini-batch, a run of the canonical order, are of about equal size: its rows, the
        longest first, go to the rank with the fewest tokens so far (Graham 1969). The same groups are always
        dealt alike; by bytes they would not be, as the times in a record compress now better, now worse.

        >>> rows = [Assignment(f"g{i}", "", 0, 7, tokens) for i, tokens in enumerate((10, 40, 20, 30, 25))]
        >>> [[row.group for row in Manifest(rows).share(rank, 2)] for rank in (0, 1)]
        [['g1', 'g2'], ['g0', 'g3', 'g4']]
        """
        rows, mine = self.groups(), []
        for index in range(mini_batches):
            run = rows[len(rows) * index // mini_batches : len(rows) * (index + 1) // mini_batches]
            taken = [0] * ranks
            for row in sorted(run, key=lambda row: -row.tokens):
                chosen = taken.index(min(taken))
                taken[chosen] += max(1, row.tokens)
                if chosen == rank:
                    mine.append(row)
        return sorted(mine)


class Assigned(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Assign`."""

    status: str
    """`batch`, `wait` or `end`."""
    reason: str
    """Why to wait: `few` (fewer than B are ready), `memory` (and none can be admitted before payloads are
    covered), `unsafe` (an earlier deadline is still leased), `uncovered` (a checkpoint is due first)."""
    raw: str
    """JSON of the `Manifest`, for a batch."""
    ready: int
    """Groups still queued after this call."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of a batch."""
        return msgspec.json.decode(self.raw, type=Manifest)


class Assign(Call[Assigned], frozen=True):
    """The batch of a step: at the head the earliest-deadline one, below it the stored manifest."""

    function: ClassVar[str] = "assign"
    epoch: str
    """Epoch of the learner, see `Joined.epoch`."""
    step: int
    """The step to train: the head, or one below it to hear its manifest again."""


class Struck(msgspec.Struct, array_like=True, frozen=True):
    """Answer of `Strike`."""

    status: str
    """`struck` (also for a repeat), `counted` (a queued group is dropped at the third), or `gone`."""


class Strike(Call[Struck], frozen=True):
    """The record of a group cannot be read: its step trains without it, and its prompt returns."""

    function: ClassVar[str] = "strike"
    epoch: str
    """Epoch of the learner."""
    step: int
    """The step it is assigned to, -1 for a group that is still queued."""
    group: str
    """Id of the group that cannot be read."""
    reason: str
    """`poison` or `lost`."""
    payload: bytes = b""
    """What was read, for the dead letter."""
