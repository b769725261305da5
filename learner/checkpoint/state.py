"""Model and optimizer as pieces of whole tensors, which do not depend on the parallel layout.

Megatron-Core's `sharded_state_dict` names for each tensor of a rank the whole it belongs to and where.
Saved pieces and wanted pieces need not be the same: another layout reads what it needs of each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from math import prod
from operator import add
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from learner.checkpoint.boxes import boxes
from learner.checkpoint.folder import check_files, random_file, read_state
from learner.convert.dist_checkpoint import DistCheckpoint
from learner.errors import CheckpointError, ModelError
from learner.model.optimizer import set_updates


class Part(msgspec.Struct, frozen=True, eq=False):
    """A piece of a whole tensor."""

    key: str
    """Megatron-Core's name of the whole."""
    shape: tuple[int, ...]
    """Dimensions of the whole."""
    start: tuple[int, ...]
    """Where the piece begins in it."""
    tensor: torch.Tensor
    """The piece, in the whole's dimensions: a view of what the model or the optimizer holds."""
    main: bool
    """Whether this rank is the one of its replicas that saves it."""


class Holding(NamedTuple):
    """What this rank's optimizer holds of a parameter: all of its elements, or a run of them."""

    parameter: torch.Tensor
    """Of the model."""
    first: int
    """Number of the run's first element."""
    tensors: dict[str, torch.Tensor]
    """[elements of the run] each: moments by name, and `fp32_param`, the exact weights, if the model's are
    rounded from them."""
    sharded: bool
    """Whether each data-parallel rank holds another run."""

    @property
    def address(self) -> int:
        """Where the parameter begins in memory."""
        return self.parameter.data_ptr()


def parts(model: GPTModel, optimizer: MegatronOptimizer, *, loading: bool = False) -> list[Part]:
    """All that a checkpoint holds of this rank; `loading` makes moments of an optimizer that has none.

    What the optimizer holds has the keys of Megatron-Core's own `sharded_state_dict`, which takes the
    parameters of a bf16 model to be all of bf16. No rank asks another for anything. Raises `CheckpointError`
    for state that is held as copies, which could not be loaded.
    """
    if loading:
        for one in _chained(optimizer):
            one.init_state_fn(one.optimizer, one.config)
    holdings = sorted(_holdings(optimizer), key=lambda holding: holding.address)
    addresses = [holding.address for holding in holdings]
    found = []
    for piece in _pieces(model):
        whole, start = tuple(piece.global_shape), tuple(piece.global_offset)
        tensor = piece.data.detach().view(_size(piece))
        found.append(Part(piece.key, whole, start, tensor, is_main_replica(piece.replica_id)))
        place = bisect_right(addresses, tensor.data_ptr()) - 1
        if place >= 0 and tensor.data_ptr() < addresses[place] + holdings[place].parameter.nbytes:
            found += _kept(piece, holdings[place])
    return found


def _pieces(model: GPTModel) -> list[ShardedTensor]:
    """This rank's parameters and saved buffers as pieces of whole tensors."""
    options = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": True,  # a key for each layer, as `launch convert` writes them
    }
    state = model.sharded_state_dict(metadata=options)
    apply_factories(state)
    values = model.state_dict(keep_vars=True).values()
    held = {value.untyped_storage().data_ptr() for value in values if torch.is_tensor(value)}
    pieces = [one for one in nested_values(state) if isinstance(one, ShardedTensor)]
    for one in pieces:
        if one.data.untyped_storage().data_ptr() not in held:
            raise CheckpointError(f"{one.key}: Megatron-Core hands out a copy of it, not the tensor itself")
    return pieces


def _size(piece: ShardedTensor) -> tuple[int, ...]:
    """Dimensions of a piece in those of the whole."""
    return (1,) * piece.prepend_axis_num + tuple(piece.local_shape)


def _kept(piece: ShardedTensor, holding: Holding) -> Iterator[Part]:
    """What is held of a piece of the parameter, as boxes of the whole tensor."""
    if not piece.data.is_contiguous():
        raise CheckpointError(f"{piece.key}: its elements do not lie one behind another in the parameter")
    offset = (piece.data.data_ptr() - holding.address) // piece.data.element_size()
    replica = (*piece.replica_id[:2], 0) if holding.sharded else piece.replica_id
    for name, run in holding.tensors.items():
        low = max(0, holding.first - offset)
        high = min(piece.data.numel(), holding.first + run.numel() - offset)
        behind = low + offset - holding.first
        for start, size in boxes(_size(piece), low, high):
            box, behind = run[behind : behind + prod(size)], behind + prod(size)
            place = tuple(map(add, piece.global_offset, start))
            key, whole = f"optimizer.state.{name}.{piece.key}", tuple(piece.global_shape)
            yield Part(key, whole, place, box.view(size), is_main_replica(replica))


def _holdings(optimizer: MegatronOptimizer) -> Iterator[Holding]:
    for one in _chained(optimizer):
        sharded = isinstance(one, DistributedOptimizer)
        for parameter, own in _owned(one):
            state = one.optimizer.state.get(own, {})
            tensors = {name: value.view(-1) for name, value in state.items() if name != "step"}
            if parameter.dtype != own.dtype:
                tensors["fp32_param"] = own.detach().view(-1)
            first = one._get_model_param_range_map(parameter)["param"].start if sharded else 0
            yield Holding(parameter, first, tensors, sharded)


def _owned(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's parameters, each with what the optimizer updates in its place, which may be a run of it."""
    if isinstance(optimizer, DistributedOptimizer):
        ranges = [
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        own = optimizer.fp32_from_fp32_groups
        ranges = [(optimizer.float16_groups, optimizer.fp32_from_float16_groups), (own, own)]
    else:
        own = [group["params"] for group in optimizer.optimizer.param_groups]
        ranges = [(own, own)]
    for models, owns in ranges:
        for group, owned in zip(models, owns, strict=True):
            yield from zip(group, owned, strict=True)


def _chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of which it consists: one for what all ranks share, one for experts if they differ."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def load(model: GPTModel, optimizer: MegatronOptimizer, folder: Path, rank: int = 0) -> int:
    """Fills model and optimizer in place from the checkpoint in `folder`; the version they then are.

    Torch's random generator goes on as that of the rank did. The optimizer must be fresh. Raises
    `CheckpointError` naming what does not fit.
    """
    saved = read_state(folder)
    if rank == 0:
        check_files(folder)
    try:
        checkpoint = DistCheckpoint(folder)
        for part in parts(model, optimizer, loading=saved.optimizer_steps > 0):
            shape = checkpoint.shapes.get(part.key)
            if shape != part.shape:
                raise CheckpointError(
                    f"{folder}: {part.key}: got shape {shape}, expected {part.shape} by config.json"
                )
            part.tensor.copy_(checkpoint.read(part.key, part.start, tuple(part.tensor.shape)))
    except (ModelError, OSError, RuntimeError) as error:  # the last: torch's, of a piece that is no tensor
        raise CheckpointError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    if saved.optimizer_steps:
        set_updates(optimizer, saved.optimizer_steps)
    random = folder / random_file(rank)
    if random.exists():  # a rank that the layout of then did not have begins anew
        torch.set_rng_state(torch.frombuffer(bytearray(random.read_bytes()), dtype=torch.uint8))
    return saved.version
