"""Where a rule's tensor lies in a distributed checkpoint: keys, and slices of keys.

They name a piece of the model whatever its layout, on disk and on the ranks that share a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from learner.convert.rule import Rule
from learner.model.shape import Shape


@dataclass(frozen=True)
class Share:
    """Where a tensor of the model lies in a checkpoint: one key, or a slice of it."""

    key: str
    """Name in the distributed checkpoint."""
    shape: tuple[int, ...]
    """Dimensions of the whole key."""
    start: tuple[int, ...]
    """Where the tensor's piece begins in it."""
    size: tuple[int, ...]
    """Dimensions of the piece, as many as the key has."""
    expert: int | None = None
    """The expert whose slice of the key it is; None: it is all of the key."""


def shares(rule: Rule, shape: Shape) -> list[Share]:
    """The pieces, in the order of their rows, that together are the rule's tensor."""
    if rule.expert is None:
        return [Share(key, dims, (0,) * len(dims), dims) for key, dims in rule.keys().items()]
    return [
        Share(key, (shape.experts.count, *dims), (rule.expert, *[0] * len(dims)), (1, *dims), rule.expert)
        for key, dims in rule.keys().items()
    ]


def pieces(rule: Rule, shape: Shape, merged: torch.Tensor) -> Iterator[tuple[Share, torch.Tensor]]:
    """The shares of a rule and the rows of its tensor `merged` that each is: views of the share's size."""
    row = 0
    for share in shares(rule, shape):
        rows = share.size[0] if rule.expert is None else merged.size(0)
        yield share, merged[row : row + rows].view(share.size)
        row += rows
