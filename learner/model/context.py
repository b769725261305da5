"""Context parallelism: how the tokens of packed sequences are dealt to ranks.

A sequence is cut into 2 * size pieces; rank r holds pieces r and 2 * size - 1 - r, so that causal attention
costs every rank the same. Worked example: two sequences of 4 and 8 tokens on 2 ranks::

    owners(cu_seqlens [0, 4, 12], 2)    [0, 1, 1, 0,   0, 0, 1, 1, 1, 1, 0, 0]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def positions(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """int64 [T]: position of each token in its own sequence."""
    lengths = torch.diff(cu_seqlens).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(len(starts), device=starts.device) - starts


def owners(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [T]: the rank, of `size`, that holds each token; lengths are multiples of 2 * size."""
    lengths = torch.diff(cu_seqlens).long()
    piece = positions(cu_seqlens) // torch.repeat_interleave(lengths // (2 * size), lengths)
    return torch.minimum(piece, 2 * size - 1 - piece)


def places(owner: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [T]: where each token lies when the shares of all ranks are laid one behind the other."""
    order = torch.cat([torch.nonzero(owner == rank).squeeze(1) for rank in range(size)])
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def gather_values(
    values: torch.Tensor, chosen: torch.Tensor, total: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """[total, ...]: from every rank of `group` its `values` [n, ...], at the indices `chosen` [n].

    Each index is chosen by one rank. Every rank goes on to compute the same with them, so the gradient of
    a value is what its own rank computes, not the sum over ranks.
    """
    return _GatherValues.apply(values, chosen, total, group)


class _GatherValues(torch.autograd.Function):
    """See `gather_values`."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, chosen: torch.Tensor, total: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(chosen)
        gathered = values.new_zeros(total, *values.shape[1:]).index_copy_(0, chosen, values)
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (chosen,) = ctx.saved_tensors
        return grad.index_select(0, chosen), None, None, None
