"""A version's chunks, shared among threads. Digests, reads and writes do not hold the interpreter meanwhile.

side_by_side(verify, range(len(manifest.chunks)))
side_by_side(pull, shares(staging.missing(), HALF), HALF)      # each has a connection of its own
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = min(8, len(os.sched_getaffinity(0)))
"""For what somebody waits for."""
HALF = max(1, THREADS // 2)
"""For what has others at work beside it: the learner's next step, or the process that sends."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> list[Result]:
    """`work` of each item, in order. Raises the first error, once what has begun by then has ended."""
    if threads == 1:
        return list(map(work, items))
    with ThreadPoolExecutor(threads, "weights") as pool:
        return list(pool.map(work, items))


def shares(numbers: Sequence[int], count: int) -> list[Sequence[int]]:
    """`numbers` in at most `count` rows, as long as each other but for the last.

    >>> shares([0, 1, 2, 5, 7], 2), shares([3], 2), shares([], 2)
    ([[0, 1, 2], [5, 7]], [[3]], [])
    """
    size = -(-len(numbers) // count)
    return [numbers[first : first + size] for first in range(0, len(numbers), size or 1)]
