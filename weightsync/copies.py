"""Copies from an image into an engine's tensors, and many of them as one.

A model of experts is exported as ten thousands of tensors, and every copy costs a launch. But they lie at
even steps, in the image as in the engine's stacked tensor, so that one copy with a dimension more does
the same:

    merged([gate of expert 0, up of expert 0, gate of expert 1, ...])    -> [all of them]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LARGEST = 256 << 20
"""Bytes of a copy up to which others are joined to it: as much memory may be needed beside it, where its ends
are on different devices and where it is compared."""


@dataclass(frozen=True, eq=False)
class Copy:
    """One copy: a view of the image into a view of an engine's tensor."""

    target: torch.Tensor
    """The view that is filled; it shares the engine's memory."""
    offset: int
    """Bytes from the start of the image to the source's first element."""
    size: tuple[int, ...]
    """Dimensions of the source, which are those of `target`."""
    stride: tuple[int, ...]
    """Of the source, in elements."""
    dtype: torch.dtype
    """Of the source."""

    def source(self, image: torch.Tensor) -> torch.Tensor:
        """The view of `image`, uint8 [bytes], that is copied."""
        item = self.dtype.itemsize
        typed = image[: image.numel() - image.numel() % item].view(self.dtype)
        return typed.as_strided(self.size, self.stride, self.offset // item)


def merged(copies: Sequence[Copy]) -> list[Copy]:
    """The same as fewer copies: those of equal shapes at even steps become one.

    Only where no two of a tensor's copies overlap, since then it does not matter which is first.
    """
    by_storage: dict[int, list[Copy]] = {}
    for copy in copies:
        by_storage.setdefault(copy.target.untyped_storage().data_ptr(), []).append(copy)
    found = []
    for group in by_storage.values():
        if _apart(group):
            group.sort(key=_address)
            while len(fewer := _joined(group)) < len(group):
                group = fewer
        found += group
    return found


def _apart(copies: Sequence[Copy]) -> bool:
    """Whether each target is one piece of memory, and no two overlap."""
    end = 0
    for copy in sorted(copies, key=_address):
        if not copy.target.is_contiguous() or _address(copy) < end:
            return False
        end = _address(copy) + copy.target.nbytes
    return True


def _joined(copies: Sequence[Copy]) -> list[Copy]:
    """One copy for each run of copies, which are in the order of their targets."""
    found, run = list[Copy](), [copies[0]]
    for copy in copies[1:]:
        if _continues(run, copy):
            run.append(copy)
        else:
            found.append(_one(run))
            run = [copy]
    return [*found, _one(run)]


def _continues(run: Sequence[Copy], copy: Copy) -> bool:
    """Whether a copy is the next step of a run."""
    last = run[-1]
    if copy.offset <= last.offset or _shape(copy) != _shape(last):
        return False
    even = len(run) == 1 or _step(last, copy) == _step(*run[:2])
    return even and (len(run) + 1) * copy.target.nbytes <= LARGEST


def _one(run: Sequence[Copy]) -> Copy:
    """The copies of a run as one, with a dimension more."""
    first, count = run[0], len(run)
    if count == 1:
        return first
    there, here = _step(*run[:2])
    shape, stride = first.target.shape, first.target.stride()
    target = first.target.as_strided((count, *shape), (there // first.target.element_size(), *stride))
    return Copy(
        target,
        first.offset,
        (count, *first.size),
        (here // first.dtype.itemsize, *first.stride),
        first.dtype,
    )


def _shape(copy: Copy) -> tuple[object, ...]:
    """What copies of one run have in common."""
    return copy.target.shape, copy.target.stride(), copy.target.dtype, copy.size, copy.stride, copy.dtype


def _step(one: Copy, other: Copy) -> tuple[int, int]:
    """Bytes from one target to the other, and from one source to the other."""
    return _address(other) - _address(one), other.offset - one.offset


def _address(copy: Copy) -> int:
    return copy.target.data_ptr()
