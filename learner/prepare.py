"""A batch made ready ahead of its step: what needs neither weights nor other data-parallel ranks.

The thread that fetches the next batch also chooses its samples and makes rows of them, and where this rank is
the only data-parallel one, packs them. Several ranks first agree on the groups of all and on the number of
micro-batches, which is left to the step.

    preparation = Preparation(config, shape, pack, alone=True)
    preparation.ahead(groups, 7)                        # in any thread
    chosen, minis = preparation.mini_batches(groups, 7) # the same, whether `ahead` was called or not
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from buffer.schema import Group
from learner.config import ObjectiveConfig
from learner.minibatch import MiniBatch, Pack, split
from learner.model.shape import Shape
from learner.model.world import sum_over_ranks, union_over_ranks
from learner.packing import Row, rows_of_groups
from learner.routed import check_routed
from learner.samples import Chosen, choose

log = logging.getLogger("learner.step")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch of this rank."""

    ids: list[str]
    """Of its groups, in canonical order."""
    chosen: Chosen
    """The part of it that is trained."""
    rows: dict[str, list[Row]]
    """By group of those that are trained: a row a sample, advantages still 0."""
    minis: list[MiniBatch] | None
    """All of the batch; None where other ranks have a say."""


class Preparation:
    """Makes batches ready. `ahead` may be called in another thread than `mini_batches`."""

    def __init__(self, config: ObjectiveConfig, shape: Shape, pack: Pack, *, alone: bool) -> None:
        """`alone`: there is one data-parallel rank, and `pack` asks no other."""
        self._config, self._shape, self._pack, self._alone = config, shape, pack, alone
        self._made: dict[int, Prepared] = {}

    def ahead(self, groups: Sequence[Group], step: int) -> None:
        """Keeps the batch of a step ready. Raises `BatchError`."""
        self._made[step] = self._make(sorted(groups, key=lambda group: group.id), step)

    def mini_batches(self, groups: list[Group], step: int) -> tuple[Chosen, list[MiniBatch]]:
        """The trained part of a batch, in canonical order, and its mini-batches, packed. Raises `BatchError`.

        What was made ahead counts if it was made of the same groups. A collective of the data-parallel ranks.
        """
        made = self._made.pop(step, None)
        if made is None or made.ids != [group.id for group in groups]:
            made = self._make(groups, step)
        for group, why in made.chosen.dropped.items():
            log.warning("step %d: group %s is dropped (reward): %s", step, group, why)
        if made.minis is not None:
            return made.chosen, made.minis
        everywhere = union_over_ranks(list(made.rows))
        count = self._config.mini_batches
        return made.chosen, split(
            made.chosen.groups, made.rows, everywhere, count, self._pack, sum_over_ranks
        )

    def _make(self, groups: list[Group], step: int) -> Prepared:
        if self._config.routing_replay:
            check_routed(groups, self._shape)
        chosen = choose(groups, self._config)
        rows = {
            group.id: rows_of_groups([group], [np.zeros(len(group.samples))], step) for group in chosen.groups
        }
        minis = None
        if self._alone:
            minis = split(chosen.groups, rows, list(rows), self._config.mini_batches, self._pack, list)
        return Prepared([group.id for group in groups], chosen, rows, minis)
