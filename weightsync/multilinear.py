"""Multilinear sums of a matrix of words in one kernel, which reads each word once.

A program takes the same `_COLUMNS` columns of `_ROWS` rows, so that a key is computed once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 2048
_ROWS = 16


@triton.jit
def _kernel(words, found, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    key = (column + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = ((key ^ (key >> 31)) | 1).to(tl.int64, bitcast=True)
    first = tl.program_id(1) * ROWS
    place = words + first.to(tl.int64) * width + column
    for row in range(first, min(first + ROWS, rows)):
        word = tl.load(place, column < width, 0)
        tl.atomic_add(found + row, tl.sum(word.to(tl.int64) * key), sem="relaxed")
        place += width


def row_sums(words: torch.Tensor) -> torch.Tensor:
    """int64 [n] of contiguous int32 [n, m] on a GPU: the sum of each row, as `weightsync.checksum` has it."""
    rows, width = words.shape
    found = torch.zeros(rows, dtype=torch.int64, device=words.device)
    with torch.cuda.device_of(words):
        _kernel[triton.cdiv(width, _COLUMNS), triton.cdiv(rows, _ROWS)](
            words, found, rows, width, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
    return found
