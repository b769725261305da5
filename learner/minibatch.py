"""A batch into mini-batches that are ready to train: packed, scored, with advantages and denominators.

groups -> valid samples -> mini-batches of packed micro-batches -> pi_p and reference where needed
       -> rewards (less the KL to the reference) -> advantages over the whole batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch

from buffer.schema import Group
from learner.config import ObjectiveConfig
from learner.objective import Totals
from learner.objective.divergence import k1
from learner.packing import MicroBatch, Row
from learner.samples import with_rewards


@dataclass(frozen=True, eq=False)
class Packed:
    """One micro-batch and what other policies than the trained one say of its N tokens."""

    batch: MicroBatch
    """The tokens as fed, and their targets."""
    proximal: torch.Tensor | None = None
    """[N] log pi_p; None: equal to pi, as there is one optimizer step."""
    reference: torch.Tensor | None = None
    """[N] log-probability under the reference model; None without one."""

    def to(self, device: torch.device) -> Packed:
        """The same with its tensors on `device`."""
        proximal, reference = (
            None if values is None else values.to(device) for values in (self.proximal, self.reference)
        )
        return Packed(self.batch.to(device), proximal, reference)


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """What one optimizer step trains, on this rank."""

    groups: list[Group]
    """In canonical order; empty where the other ranks have all of the mini-batch."""
    packed: list[Packed]
    """Its micro-batches, as many on every data-parallel rank."""
    totals: Totals
    """Over all data-parallel ranks."""


Pack = Callable[[Sequence[Row]], list[MicroBatch]]
"""Micro-batches of rows, as many on every data-parallel rank."""

Score = Callable[[Sequence[MicroBatch]], list[torch.Tensor]]
"""Log-probabilities [N] of each micro-batch's targets, without gradient."""


def split(
    groups: Sequence[Group],
    rows: Mapping[str, Sequence[Row]],
    everywhere: Sequence[str],
    count: int,
    pack: Pack,
    over_ranks: Callable[[list[float]], list[float]],
) -> list[MiniBatch]:
    """`count` mini-batches of `groups`, whose samples' rows are `rows` by group; packed, advantages still 0.

    `everywhere` holds the ids of all ranks' groups in canonical order: a mini-batch is a run of them, sizes
    differing by at most 1, so which groups train together does not depend on the layout. `over_ranks`
    adds numbers over the data-parallel ranks; each rank calls it and `pack` once a mini-batch.
    """
    minis, size = [], len(everywhere)
    for index in range(count):
        members = set(everywhere[size * index // count : size * (index + 1) // count])
        part = [group for group in groups if group.id in members]
        batches = pack([row for group in part for row in rows[group.id]])
        sizes = [float(sum(len(b.targets) for b in batches)), float(sum(len(b.rows) for b in batches))]
        minis.append(MiniBatch(part, [Packed(batch) for batch in batches], Totals(*over_ranks(sizes))))
    return minis


def scored(minis: Sequence[MiniBatch], score: Score, field: str) -> list[MiniBatch]:
    """The mini-batches with `field` (`proximal` or `reference`) filled in by `score`.

    The same micro-batches are scored that are trained, so that equal weights give equal bits.
    """
    found = []
    for mini in minis:
        scores = score([part.batch for part in mini.packed])
        packed = [replace(p, **{field: values}) for p, values in zip(mini.packed, scores, strict=True)]
        found.append(replace(mini, packed=packed))
    return found


def less_divergence(minis: Sequence[MiniBatch], config: ObjectiveConfig) -> list[MiniBatch]:
    """The groups with the KL to the reference in their rewards: r - coefficient * sum of log pi_p - log ref.

    The sum runs over the sample's trained tokens (k1).
    """
    result = []
    for mini in minis:
        spent = np.zeros(sum(len(group.samples) for group in mini.groups))
        for packed in mini.packed:
            assert packed.proximal is not None
            assert packed.reference is not None
            values = k1(packed.proximal.double() - packed.reference.double())
            rows = np.asarray(packed.batch.rows, np.int64)[packed.batch.sample.numpy()]
            np.add.at(spent, rows, values.numpy())
        costs = iter(config.kl.coefficient * spent)
        groups = [
            msgspec.structs.replace(
                group,
                samples=with_rewards(group.samples, [s.reward - next(costs) for s in group.samples]),
            )
            for group in mini.groups
        ]
        result.append(replace(mini, groups=groups))
    return result


def with_advantages(minis: Sequence[MiniBatch], advantages: Sequence[np.ndarray]) -> list[MiniBatch]:
    """The mini-batches with an advantage for every token; `advantages` holds a [G] for each group."""
    result, values = [], iter(advantages)
    for mini in minis:
        by_row = np.concatenate([np.zeros(0), *(next(values) for _ in mini.groups)])
        packed = []
        for part in mini.packed:
            rows = np.asarray(part.batch.rows, np.int64)[part.batch.sample.numpy()]
            tokens = torch.from_numpy(by_row[rows].astype(np.float32))
            packed.append(replace(part, batch=replace(part.batch, advantages=tokens)))
        result.append(replace(mini, packed=packed))
    return result
