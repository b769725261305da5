"""Sequences of different lengths into packed micro-batches, padded only where a layout demands it.

A sequence's last token is never fed to the model: nothing is predicted from it. A token outside
the loss mask is context; it is fed but is no target.

Worked example: prompt ``[5, 6]`` with answer ``[7, 8]``, and prompt ``[5]`` with answer ``[9]``,
in one micro-batch::

    tokens      [5, 6, 7,  5]      what is fed
    cu_seqlens  [0, 3, 4]          where sequences start and end
    predictors  [1, 2, 3]          index into tokens: fed 6, predict 7; fed 7, predict 8; fed 5, predict 9
    targets     [7, 8, 9]
    sample      [0, 0, 1]          which sequence a target belongs to

Context parallelism cuts every sequence into 2 C equal pieces, sequence parallelism every rank's tokens
into T equal ones (C and T: its ranks). Sequences are therefore followed by tokens that no target is predicted
from and that, as attention is causal, no other token sees. With C = 2 the example is::

    tokens             [5, 6, 7, 0,  5, 0, 0, 0]
    cu_seqlens_padded  [0, 4, 8]   where sequences start, and the next one does
    cu_seqlens         [0, 3, 4]   as without padding: their lengths
    predictors         [1, 2, 4]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from buffer.schema import Group
from learner.bins import first_fit, spread
from learner.flops import Cost


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence to feed and what to predict in it. n is the number of its targets."""

    tokens: np.ndarray
    """Integer [T]: the whole sequence."""
    targets: np.ndarray
    """Integer [n], rising: indices into `tokens`, each at least 1, that are predicted."""
    behaviour: np.ndarray
    """float32 [n]: log-probability of each target under the policy that wrote it."""
    staleness: np.ndarray
    """Integer [n]: step minus the version that wrote each target."""
    advantage: float = 0.0
    """Advantage of the sample."""
    temperature: float = 1.0
    """Temperature under which it was sampled."""
    routed: np.ndarray | None = None
    """uint16 [T - 1, L, k]: experts of each fed token (`buffer.schema.Sample`); None: the model chooses."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """S packed sequences of T fed tokens with N targets, in tensors that `pack` leaves on the CPU.

    An empty one has a sequence of padding that belongs to no row, and N = 0: a rank with nothing left to
    train feeds it so that the collectives of the others meet.
    """

    tokens: torch.Tensor
    """int64 [T]: fed tokens, sequence after sequence, 0 where padded."""
    positions: torch.Tensor
    """int64 [T]: position of each token in its own sequence."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]: sums of the sequences' lengths, without padding."""
    cu_seqlens_padded: torch.Tensor
    """int32 [S + 1]: bounds of the sequences in `tokens`, padding behind each included; ends at T."""
    max_length: int
    """Length of the longest fed sequence with its padding."""
    predictors: torch.Tensor
    """int64 [N]: index into `tokens` of the token from which each target is predicted."""
    targets: torch.Tensor
    """int64 [N]: token ids to predict."""
    sample: torch.Tensor
    """int64 [N]: sequence of each target, 0..S-1, never falling."""
    rows: tuple[int, ...]
    """[S]: index of each sequence in the list of rows that was packed; of an empty micro-batch ()."""
    behaviour: torch.Tensor
    """float32 [N]: log-probability under the behaviour policy."""
    advantages: torch.Tensor
    """float32 [N]: advantage of the sample of each target."""
    staleness: torch.Tensor
    """int64 [N]: staleness of each target."""
    temperature: torch.Tensor
    """float32 [N]: sampling temperature of each target."""
    routed: torch.Tensor | None = None
    """int16 [T, L, k]: the experts to send fed tokens to, 0, 1, ... where padded; None: the model chooses."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`; itself where they are there."""
        if self.tokens.device == device:
            return self
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


def rows_of_groups(groups: Sequence[Group], advantages: Sequence[np.ndarray], step: int) -> list[Row]:
    """One row a sample, in order; `advantages` holds an array [G] for each group."""
    return [
        _row_of_sample(group, index, float(advantage), step)
        for group, values in zip(groups, advantages, strict=True)
        for index, advantage in enumerate(values)
    ]


def row_of_tokens(tokens: Sequence[int], first_target: int, temperature: float = 1.0) -> Row:
    """A row that predicts every token from index `first_target` (at least 1) on."""
    targets = np.arange(first_target, len(tokens))
    zeros = np.zeros(len(targets), np.float32)
    staleness = np.zeros(len(targets), np.int64)
    return Row(np.asarray(tokens, np.int64), targets, zeros, staleness, temperature=temperature)


def pack(
    rows: Sequence[Row],
    budget: int,
    *,
    context: int = 1,
    tensor: int = 1,
    count: int | None = None,
    cost: Cost | None = None,
) -> list[MicroBatch]:
    """Micro-batches of at most `budget` fed tokens, padding of single sequences included.

    By first-fit decreasing; ties keep the order of `rows`, and so do the sequences of a micro-batch. A row
    without targets is left out; one longer than the budget gets a micro-batch of its own. `context` and
    `tensor` are the ranks that share a sequence's positions. `count`, at least as many as that takes, asks
    for so many micro-batches, the last of them empty if need be; with a `cost` they are of about equal
    cost, dearest first, so that ranks which wait for one another do the same work between two waits.
    """
    used = [index for index, row in enumerate(rows) if len(row.targets)]
    lengths = np.array([len(rows[index].tokens) - 1 for index in used], np.int64)
    lengths += -lengths % _multiple(context)
    if count is not None and cost is not None:
        targets = np.array([len(rows[index].targets) for index in used])
        bins = spread(lengths, cost.flops(lengths, targets), budget, count)
    else:
        bins = first_fit(lengths, budget)
        bins += [[] for _ in range(0 if count is None else count - len(bins))]
    return [_micro_batch(rows, sorted(used[i] for i in members), context, tensor) for members in bins]


def _multiple(context: int) -> int:
    """What a sequence's length is a multiple of."""
    return 2 * context if context > 1 else 1


def _row_of_sample(group: Group, index: int, advantage: float, step: int) -> Row:
    sample = group.samples[index]
    mask = sample.loss_mask()
    numbers = [group.versions[span.version].number for span in sample.spans]
    versions = np.repeat(np.array(numbers, np.int64), [span.length for span in sample.spans])
    return Row(
        tokens=sample.tokens,
        targets=sample.prompt_length + np.flatnonzero(mask),
        behaviour=sample.logprobs[mask],
        staleness=step - versions[mask],
        advantage=advantage,
        temperature=group.temperature,
        routed=sample.routed,
    )


def _micro_batch(rows: Sequence[Row], members: list[int], context: int, tensor: int) -> MicroBatch:
    chosen = [rows[index] for index in members]
    lengths = np.array([len(row.tokens) - 1 for row in chosen] or [0])
    counts = np.array([len(row.targets) for row in chosen] or [0])
    padded = lengths + -lengths % _multiple(context)
    # A rank's share, 1 / context of all, is split over the tensor-parallel ranks.
    whole = math.lcm(_multiple(context), context * tensor)
    padded[-1] += -padded.sum() % whole or (0 if chosen else whole)
    bounds = np.concatenate([[0], np.cumsum(padded)])
    starts = bounds[:-1]
    positions = np.arange(bounds[-1]) - np.repeat(starts, padded)
    tokens, fed = np.zeros(bounds[-1], np.int64), positions < np.repeat(lengths, padded)
    tokens[fed] = _joined([row.tokens[:-1] for row in chosen])
    return MicroBatch(
        tokens=_long(tokens),
        positions=_long(positions),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        cu_seqlens_padded=torch.from_numpy(bounds.astype(np.int32)),
        max_length=int(padded.max()),
        predictors=_long(np.repeat(starts, counts) + _joined([row.targets for row in chosen]) - 1),
        targets=_long(_joined([row.tokens[row.targets] for row in chosen])),
        sample=_long(np.repeat(np.arange(len(counts)), counts)),
        rows=tuple(members),
        behaviour=_float(_joined([row.behaviour for row in chosen])),
        advantages=_float(np.repeat([row.advantage for row in chosen] or [0.0], counts)),
        staleness=_long(_joined([row.staleness for row in chosen])),
        temperature=_float(np.repeat([row.temperature for row in chosen] or [1.0], counts)),
        routed=_routed(rows, chosen, fed),
    )


def _routed(rows: Sequence[Row], chosen: Sequence[Row], fed: np.ndarray) -> torch.Tensor | None:
    """The experts of fed tokens, where `fed` [T] is true, and any for padding; None without a row's own."""
    some = next((row.routed for row in rows if row.routed is not None), None)
    if some is None:
        return None
    routed = np.empty((len(fed), *some.shape[1:]), np.uint16)
    routed[~fed] = np.arange(some.shape[2], dtype=np.uint16)
    if chosen:
        routed[fed] = np.concatenate([row.routed for row in chosen if row.routed is not None])
    return torch.from_numpy(routed.view(np.int16))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
