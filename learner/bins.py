"""Which sequences share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def first_fit(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """First-fit decreasing: the members of each bin of at most `budget` tokens, in order of placing.

    Deterministic: equal lengths keep their order. A sequence longer than the budget gets a bin alone.

    >>> first_fit([6, 5, 4, 3, 2], 10)
    [[0, 2], [1, 3, 4]]
    """
    lengths = np.asarray(lengths)
    bins: list[list[int]] = []
    free = np.zeros(0, np.int64)
    for index in np.argsort(-lengths, kind="stable"):
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


def spread(lengths: np.ndarray, costs: np.ndarray, budget: int, count: int) -> list[list[int]]:
    """`count` bins of about equal cost, dearest first; those beyond the number of sequences are empty.

    The dearest sequence left goes into the cheapest bin with room for it (longest processing time first,
    Graham 1969); where that leads to one without room, the bins are those of `first_fit`, of which
    there must be at most `count`.

    >>> lengths = np.array([6, 5, 4, 3, 2])
    >>> spread(lengths, costs=lengths, budget=10, count=3)
    [[1, 4], [2, 3], [0]]
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    spent, free = np.zeros(count), np.full(count, budget)
    for index in np.argsort(-costs, kind="stable"):
        room = np.flatnonzero((free >= lengths[index]) | (free == budget))
        if not len(room):
            bins = first_fit(lengths, budget)
            bins += [[] for _ in range(count - len(bins))]
            break
        chosen = room[np.argmin(spent[room])]
        bins[chosen].append(int(index))
        spent[chosen] += costs[index]
        free[chosen] -= lengths[index]
    return sorted(bins, key=lambda members: -costs[members].sum())
