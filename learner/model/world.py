"""The processes that train together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def join_world(store: dist.Store | None = None, rank: int = 0, size: int = 1) -> None:
    """Join a gloo world of `size` data-parallel ranks (no tensor, pipeline or context parallelism).

    `store` is where the ranks meet; a world of one meets in its own memory, without a socket.
    Joining again from the same process keeps the world it has.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=store or dist.HashStore(), rank=rank, world_size=size)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def sum_over_ranks(values: list[float]) -> list[float]:
    """The element-wise sum over the data-parallel ranks, exact for counts below 2**53."""
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return totals.tolist()
