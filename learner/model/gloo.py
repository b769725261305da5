"""Gathering and scattering of unequal parts, which gloo does not know.

Expert tensor parallelism needs them: its ranks hold as many tokens as the router sent them. Both take the
arguments of the functions of Megatron-Core whose place they take, and leave equal parts to those.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

_gather_equal = mappings._gather_along_first_dim
_scatter_equal = mappings._reduce_scatter_along_first_dim


def gather(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """The rows of all ranks of `group`, of which each has as many as `output_split_sizes` says."""
    if output_split_sizes is None or group.size() == 1:
        return _gather_equal(input_, group, None, use_global_buffer)
    padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in output_split_sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)])


def reduce_scatter(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """This rank's rows, as many as `input_split_sizes` says, of the sum over all ranks of `group`."""
    if input_split_sizes is None or group.size() == 1:
        return _scatter_equal(input_, group, None, use_global_buffer)
    total = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(input_split_sizes)[group.rank()].contiguous()
