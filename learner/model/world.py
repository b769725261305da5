"""The processes that train together, and how they share the model.

Ranks are numbered with tensor parallelism fastest, then context, data and pipeline parallelism. The ranks of
one data-parallel index are given the same groups, so numbers are added over data-parallel ranks alone; what
only the last stage of a pipeline knows is sent to the others.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from learner.config import ParallelConfig
from learner.errors import ConfigError

_T = TypeVar("_T")


def join_world(
    store: dist.Store | None = None, rank: int = 0, size: int = 1, parallel: ParallelConfig | None = None
) -> None:
    """Join a gloo world of `size` ranks that share the model as `parallel` says (None: each has all of it).

    `store` is where the ranks meet; a world of one meets in its own memory, without a socket. Joining again
    from the same process keeps the world it has. Raises `ConfigError` if `size` does not divide up.
    """
    parallel = parallel or ParallelConfig()
    _check(parallel, size)
    if not dist.is_initialized():
        dist.init_process_group(_backend(rank), store=store or dist.HashStore(), rank=rank, world_size=size)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )


def sizes() -> ParallelConfig:
    """How the ranks of the world that was joined share the model."""
    return ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def described() -> str:
    """The ranks and how they share the model, in words; one rank where no world was joined."""
    if not parallel_state.is_initialized() or dist.get_world_size() == 1:
        return "1 rank"
    shared = [f"{field} {size}" for field, size in msgspec.structs.asdict(sizes()).items() if size > 1]
    return " ".join([f"{dist.get_world_size()} ranks", *shared])


def from_rank_0(numbers: list[int]) -> list[int]:
    """The numbers of rank 0, as many on every rank, on all ranks of the world."""
    if dist.get_world_size() == 1:
        return numbers
    agreed = torch.tensor(numbers)
    dist.broadcast(agreed, 0)
    return agreed.tolist()


def _backend(rank: int) -> str:
    """gloo, and beside it NCCL for what lies on this rank's GPU."""
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return "cpu:gloo,cuda:nccl"


def rank() -> int:
    """Number of this process among all, whatever they share."""
    return dist.get_rank()


def count_ranks(true: bool) -> int:
    """How many of all processes say so."""
    count = torch.tensor(int(true))
    dist.all_reduce(count)
    return int(count)


def sum_over_ranks(values: list[float]) -> list[float]:
    """The element-wise sum over the data-parallel ranks, exact for counts below 2**53."""
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals, group=group)
    return totals.tolist()


def max_over_ranks(values: list[float]) -> list[float]:
    """The element-wise maximum over the data-parallel ranks."""
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest.tolist()


def merge_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """The sum by name over the data-parallel ranks, names sorted; one that a rank lacks counts 0 there."""
    names = union_over_ranks(list(sums))
    return dict(zip(names, sum_over_ranks([sums.get(name, 0.0) for name in names]), strict=True))


def union_over_ranks(names: list[str], group: dist.ProcessGroup | None = None) -> list[str]:
    """Every name, none of them empty or with a line break, that some rank of `group` has; sorted.

    None: the data-parallel ranks.
    """
    parts = gather_bytes("\n".join(names).encode(), group or parallel_state.get_data_parallel_group())
    return sorted({name for part in parts for name in part.decode().split("\n")} - {""})


def gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """The `data` of each rank of `group`, in the order of ranks. (Gathering objects would pickle them.)"""
    if group.size() == 1:
        return [data]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    size = max(1, *(int(length) for length in lengths))
    padded = torch.zeros(size, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return [part[: int(length)].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]


def from_last_stage(value: _T, kind: type[_T]) -> _T:
    """What the last stage of the pipeline calls `value`, on every stage; `kind` is its type, for msgspec."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    # Only the last part counts: the others send nothing.
    data = msgspec.msgpack.encode(value) if parallel_state.is_pipeline_last_stage() else b""
    return msgspec.msgpack.decode(gather_bytes(data, group)[-1], type=kind)


def tensor_from_last_stage(tensor: torch.Tensor | None) -> torch.Tensor:
    """The last stage's fp32 `tensor`, on every stage; the others may give None."""
    group = parallel_state.get_pipeline_model_parallel_group()
    shape = from_last_stage([] if tensor is None else list(tensor.shape), list[int])
    received = torch.empty(shape) if tensor is None else tensor
    if group.size() > 1:
        dist.broadcast(received, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return received


def _check(parallel: ParallelConfig, size: int) -> None:
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    for what, fields, holders in (
        ("the model", ("tensor", "pipeline", "context"), parallel.model_size),
        ("its experts", ("expert", "expert_tensor", "pipeline"), experts),
    ):
        if size % holders:
            product = " x ".join(f"{field} {getattr(parallel, field)}" for field in fields)
            raise ConfigError(
                f"model.parallel: got {product} = {holders} ranks for a copy of {what}, which does not "
                f"divide the {size} ranks of the learner; start a multiple of {holders}"
            )
