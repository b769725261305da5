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
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
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
    if optimizer.config.use_distributed_optimizer:
        kept = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=options)
    else:
        kept = _kept(optimizer, state["model"], loading)
    state["optimizer"] = kept
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
    return max((int(state["step"]) for _, state in _states(optimizer) if "step" in state), default=0)


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
        for _, state in _states(optimizer):
            state["step"] = torch.tensor(float(saved.optimizer_steps))
    random = folder / random_file(rank)
    if random.exists():  # a rank that the layout of then did not have begins anew
        torch.set_rng_state(torch.frombuffer(bytearray(random.read_bytes()), dtype=torch.uint8))
    return saved.version


def _kept(optimizer: MegatronOptimizer, model: dict[str, Any], loading: bool) -> list[Any]:
    """What the optimizer holds of each tensor in `model`, the model's sharded state, under the same keys.

    The keys are those of Megatron-Core's own `sharded_state_dict`, which takes the parameters of a bf16 model
    to be all of bf16; the fp32 weight beneath one is its `fp32_param`.
    """
    if loading:
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            one.init_state_fn(one.optimizer, one.config)
    states = {id(parameter): state for parameter, state in _states(optimizer)}
    kept = []
    for sharded in nested_values(model):
        if not isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            continue
        exact = getattr(sharded.data, "main_param", sharded.data)
        values = {name: value for name, value in states.get(id(exact), {}).items() if name != "step"}
        if exact is not sharded.data:
            values["fp32_param"] = exact
        for name, value in values.items():
            kept.append(make_sharded_optimizer_tensor(sharded, value, f"optimizer.state.{name}"))
    return kept


def _held(model: GPTModel, optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    for parameter, state in _states(optimizer):
        yield parameter  # bf16: the fp32 weight
        yield from state.values()
    yield from (value for value in model.state_dict(keep_vars=True).values() if torch.is_tensor(value))


def _states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter of each chained optimizer, and what is held of it."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in one.optimizer.param_groups:
            yield from ((value, one.optimizer.state.get(value, {})) for value in group["params"])
