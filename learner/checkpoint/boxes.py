"""A run of consecutive elements of a tensor as boxes of it.

Megatron-Core's distributed optimizer deals out a parameter by its elements, wherever rows end; a checkpoint
knows boxes alone. Of a matrix a run is at most three: the end of a row, whole rows, the start of a row::

    boxes((4, 3), 2, 10)    ((0, 2), (1, 1))    ((1, 0), (2, 3))    ((3, 0), (1, 1))
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where it starts, and its dimensions."""


def boxes(shape: tuple[int, ...], low: int, high: int) -> Iterator[Box]:
    """The elements `low` to `high`, without that one, of a tensor of `shape`, in order; maybe none.

    Elements are counted in the tensor's own order, and so lie in each box; `shape` has a dimension at least.
    """
    if low >= high:
        return
    if len(shape) == 1:
        yield (low,), (high - low,)
        return
    row = prod(shape[1:])
    first, last = -(-low // row), high // row
    if first > last:  # all in one row
        yield from _in_row(shape, last, low, high)
        return
    yield from _in_row(shape, first - 1, low, first * row)
    if first < last:
        rest = shape[1:]
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _in_row(shape, last, last * row, high)


def _in_row(shape: tuple[int, ...], number: int, low: int, high: int) -> Iterator[Box]:
    """Those elements from `low` to `high`, counted over the whole tensor, that are all in row `number`."""
    before = number * prod(shape[1:])
    for start, size in boxes(shape[1:], low - before, high - before):
        yield (number, *start), (1, *size)
