"""Sequences of different lengths into packed micro-batches without padding.

A sequence's last token is never fed to the model: nothing is predicted from it. A token outside
the loss mask is context; it is fed but is no target.

Worked example: prompt ``[5, 6]`` with answer ``[7, 8]``, and prompt ``[5]`` with answer ``[9]``,
in one micro-batch::

    tokens      [5, 6, 7,  5]      what is fed
    cu_seqlens  [0, 3, 4]          where sequences start and end
    predictors  [1, 2, 3]          index into tokens: fed 6, predict 7; fed 7, predict 8; fed 5, predict 9
    targets     [7, 8, 9]
    sample      [0, 0, 1]          which sequence a target belongs to
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from buffer.schema import Group


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


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """S packed sequences of T fed tokens with N targets, in tensors on the CPU."""

    tokens: torch.Tensor
    """int64 [T]: fed tokens, sequence after sequence."""
    positions: torch.Tensor
    """int64 [T]: position of each token in its own sequence."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]: bounds of the sequences in `tokens`."""
    max_length: int
    """Length of the longest fed sequence."""
    predictors: torch.Tensor
    """int64 [N]: index into `tokens` of the token from which each target is predicted."""
    targets: torch.Tensor
    """int64 [N]: token ids to predict."""
    sample: torch.Tensor
    """int64 [N]: sequence of each target, 0..S-1, never falling."""
    rows: tuple[int, ...]
    """[S]: index of each sequence in the list of rows that was packed."""
    behaviour: torch.Tensor
    """float32 [N]: log-probability under the behaviour policy."""
    advantages: torch.Tensor
    """float32 [N]: advantage of the sample of each target."""
    staleness: torch.Tensor
    """int64 [N]: staleness of each target."""
    temperature: torch.Tensor
    """float32 [N]: sampling temperature of each target."""


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


def pack(rows: Sequence[Row], budget: int) -> list[MicroBatch]:
    """First-fit decreasing into micro-batches of at most `budget` fed tokens.

    Deterministic: ties keep the order of `rows`, and so do the sequences of a micro-batch. A row
    without targets is left out; one longer than the budget gets a micro-batch of its own.
    """
    lengths = np.array([len(row.tokens) - 1 for row in rows], np.int64)
    used = [index for index in np.argsort(-lengths, kind="stable") if len(rows[index].targets)]
    return [_micro_batch(rows, sorted(members)) for members in _first_fit(used, lengths, budget)]


def idle() -> MicroBatch:
    """A micro-batch without targets: one token that is fed and predicts nothing."""
    row = Row(np.zeros(2, np.int64), *[np.zeros(0, kind) for kind in (np.int64, np.float32, np.int64)])
    return replace(_micro_batch([row], [0]), rows=())


def _first_fit(order: list[int], lengths: np.ndarray, budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free = np.zeros(0, np.int64)
    for index in order:
        room = np.flatnonzero(free >= lengths[index])
        if len(room):
            chosen = int(room[0])
        else:
            chosen = len(bins)
            bins.append([])
            free = np.append(free, budget)
        bins[chosen].append(int(index))
        free[chosen] -= lengths[index]
    return bins


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
    )


def _micro_batch(rows: Sequence[Row], members: list[int]) -> MicroBatch:
    chosen = [rows[index] for index in members]
    lengths = np.array([len(row.tokens) - 1 for row in chosen])
    counts = np.array([len(row.targets) for row in chosen])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts = bounds[:-1]
    targets = np.concatenate([row.targets for row in chosen])
    return MicroBatch(
        tokens=_long(np.concatenate([row.tokens[:-1] for row in chosen])),
        positions=_long(np.arange(bounds[-1]) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_length=int(lengths.max()),
        predictors=_long(np.repeat(starts, counts) + targets - 1),
        targets=_long(np.concatenate([row.tokens[row.targets] for row in chosen])),
        sample=_long(np.repeat(np.arange(len(chosen)), counts)),
        rows=tuple(members),
        behaviour=_float(np.concatenate([row.behaviour for row in chosen])),
        advantages=_float(np.repeat([row.advantage for row in chosen], counts)),
        staleness=_long(np.concatenate([row.staleness for row in chosen])),
        temperature=_float(np.repeat([row.temperature for row in chosen], counts)),
    )


def _long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
