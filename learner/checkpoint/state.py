"""Model and optimizer as pieces of whole tensors, which do not depend on the parallel layout.

Megatron-Core's `sharded_state_dict` names for each tensor of a rank the whole it belongs to and where.
Saved pieces and wanted pieces need not be the same: another layout reads what it needs of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from learner.checkpoint.folder import check_files, random_file, read_state
from learner.convert.dist_checkpoint import DistCheckpoint
from learner.errors import CheckpointError, ModelError


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


def parts(model: GPTModel, optimizer: MegatronOptimizer, *, loading: bool = False) -> list[Part]:
    """All that a checkpoint holds of this rank; `loading` makes moments of an optimizer that has none.

    Raises `CheckpointError` for optimizer state that is held as copies, which could not be loaded.
    """
    options = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": True,  # a key for each layer, as `launch convert` writes them
        "chained_optim_avoid_prefix": True,  # nor does a key say which of several optimizers held it
    }
    state = {"model": model.sharded_state_dict(metadata=options)}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=options)
    apply_factories(state)
    held = {tensor.untyped_storage().data_ptr() for tensor in _held(model, optimizer)}
    found = []
    for one in nested_values(state):
        if isinstance(one, ShardedTensor):
            if one.data.untyped_storage().data_ptr() not in held:
                raise CheckpointError(
                    f"{one.key}: Megatron-Core hands out a copy of it, not the tensor itself"
                )
            size = (1,) * one.prepend_axis_num + tuple(one.local_shape)
            whole, start = tuple(one.global_shape), tuple(one.global_offset)
            tensor = one.data.detach().view(size)
            found.append(Part(one.key, whole, start, tensor, is_main_replica(one.replica_id)))
    return found


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Updates behind the moments of the optimizer."""
    return max((int(state["step"]) for state in _states(optimizer) if "step" in state), default=0)


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
        for state in _states(optimizer):
            state["step"] = torch.tensor(float(saved.optimizer_steps))
    random = folder / random_file(rank)
    if random.exists():  # a rank that the layout of then did not have begins anew
        torch.set_rng_state(torch.frombuffer(bytearray(random.read_bytes()), dtype=torch.uint8))
    return saved.version


def _held(model: GPTModel, optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    for values in [model.state_dict(keep_vars=True), *_states(optimizer)]:
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))
    for group in optimizer.param_groups:  # with bf16 parameters, the fp32 ones that are updated
        yield from group["params"]


def _states(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    """What each chained optimizer holds of each parameter."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from one.optimizer.state.values()
