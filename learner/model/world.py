"""The processes that train together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def join_world(store: dist.Store | None = None, rank: int = 0, size: int = 1) -> None:
    """Join a world of `size` data-parallel ranks (no tensor, pipeline or context parallelism).

    `store` is where the ranks meet; a world of one meets in its own memory, without a socket.
    Joining again from the same process keeps the world it has.
    """
    if not dist.is_initialized():
        dist.init_process_group(_backend(rank), store=store or dist.HashStore(), rank=rank, world_size=size)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def _backend(rank: int) -> str:
    """gloo, and beside it NCCL for what lies on this rank's GPU."""
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return "cpu:gloo,cuda:nccl"


def sum_over_ranks(values: list[float]) -> list[float]:
    """The element-wise sum over the data-parallel ranks, exact for counts below 2**53."""
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return totals.tolist()


def max_over_ranks(values: list[float]) -> list[float]:
    """The element-wise maximum over the data-parallel ranks."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return largest.tolist()


def merge_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The sum by name over the data-parallel ranks, names sorted; one that a rank lacks counts 0 there."""
    names = union_over_ranks(list(sums))
    return dict(zip(names, sum_over_ranks([sums.get(name, 0.0) for name in names]), strict=True))


def union_over_ranks(names: list[str]) -> list[str]:
    """Every name, none of them empty or with a line break, that some data-parallel rank has; sorted."""
    group = parallel_state.get_data_parallel_group()
    # As padded bytes: gathering objects would pickle them.
    encoded = torch.frombuffer(bytearray("\n".join(["", *names]).encode() + b"\n"), dtype=torch.uint8)
    size = int(max_over_ranks([float(len(encoded))])[0])
    padded = torch.nn.functional.pad(encoded, (0, size - len(encoded)), value=ord("\n"))
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, padded, group=group)
    return sorted({name for part in gathered for name in bytes(part.tolist()).decode().split("\n")} - {""})
