"""One rank of a world: trains every model in every layout of its size, and writes what came out.

`python -m tests.parallel.rank RANK SIZE FOLDER`, once for each rank; models are in the folder.
"""

from __future__ import annotations

import sys
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from learner.convert.held import whole_tensors
from learner.model.world import join_world
from learner.step import Trainer
from tests.parallel.layouts import OBJECTIVES, reference_of, trials
from tests.parallel.processes import leave
from tests.unit.learner.groups import make_group, with_experts

CLIP = 0.1
"""Below every norm here, so that clipping acts."""

SEQUENCES = [list(range(length)) for length in (2, 9, 30, 5, 17)]


def six_groups() -> list:
    """Of unlike lengths and ages."""
    return [make_group(index, versions=(0,) if index % 2 else (-1, 0)) for index in range(6)]


def batch(trainer: Trainer, objective: ObjectiveConfig) -> list:
    """Six groups, with routed experts if they are replayed."""
    groups = six_groups()
    experts, layers = trainer._shape.experts, len(trainer._shape.layers)
    if not objective.routing_replay or experts is None:
        return groups
    return [with_experts(group, layers, experts.chosen, experts.count) for group in groups]


def share(groups: list) -> list:
    """Those of this data-parallel rank: unequal shares, so that a local mean would show."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    bounds = [0, *range(7 - ranks, 7)]
    return groups[bounds[rank] : bounds[rank + 1]]


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients of the last step, after clipping, put together from all ranks as weights are."""
    if trainer._parallel.ddp_config.use_distributed_optimizer:
        gather_gradients(trainer)
    parameters = list(trainer._model.parameters())
    own = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad
    merged = whole_tensors(trainer._model, trainer._shape)
    found = {rule.mcore: tensor.to("cpu", torch.float32, copy=True) for rule, tensor in merged}
    for parameter, data in zip(parameters, own, strict=True):
        parameter.data = data
    return {name: tensor for name, tensor in found.items() if not name.endswith("expert_bias")}


def gather_gradients(trainer: Trainer) -> None:
    """Have each data-parallel rank hold the sums of all gradients: the optimizer needs those of its part."""
    for buffer in (*trainer._parallel.buffers, *trainer._parallel.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def train(
    folder: Path,
    parallel: ParallelConfig,
    objective: ObjectiveConfig,
    all_calls: bool,
    dtype: str = "float32",
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Figures of a step and what the model scores before it, and what else a trainer can do if `all_calls`;
    tensors on rank 0."""
    if objective.kl.coefficient:
        kl = msgspec.structs.replace(objective.kl, reference=str(reference_of(folder)))
        objective = msgspec.structs.replace(objective, kl=kl)
    model = ModelConfig(
        path=str(folder),
        micro_batch_tokens=48,
        parallel=parallel,
        logits_chunk=7,
        recompute="full" if objective.routing_replay else "none",
        dtype=dtype,
    )
    trainer = Trainer(folder, model, OptimizerConfig(lr=1e-3, warmup_steps=0, clip_grad=CLIP), objective)
    tensors = {f"weight {name}": tensor for name, tensor in trainer.export().items()}
    scores = [values.tolist() for values in trainer.score(SEQUENCES)]
    metrics = trainer.train_step(share(batch(trainer, objective)), 0)
    tensors |= {f"gradient {name}": tensor for name, tensor in gradients(trainer).items()}
    steady = {
        name: value
        for name, value in metrics.items()
        if not name.startswith(("seconds", "tflops", "mfu", "micro_batches"))
    }
    rest = other_calls(trainer) if all_calls else {}
    return {"metrics": steady, "scores": scores, **rest}, tensors


def other_calls(trainer: Trainer) -> dict[str, Any]:
    """Answers that the model writes, and losses of supervised steps, some of them undone."""
    answers = trainer.generate(SEQUENCES, 3, eos_id=-1, seed=4)
    start = trainer.snapshot()
    demonstrations = [([1, 2, value], [value, 5, 0]) for value in range(8, 20)]
    ranks = parallel_state.get_data_parallel_world_size()
    part = demonstrations[parallel_state.get_data_parallel_rank() :: ranks]
    losses = [trainer.sft_step(part, 1e-2)["loss"] for _ in range(2)]
    trainer.restore(start)
    losses.append(trainer.sft_step(part, 1e-2)["loss"])
    return {"answers": answers, "losses": losses}


def keep(out: Path, rank: int, figures: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes what a rank found for the test to read; tensors are rank 0's."""
    out.with_suffix(f".{rank}.json").write_bytes(msgspec.json.encode(figures))
    if rank == 0:
        save_file(tensors, out.with_suffix(".safetensors"))


def main(rank: int, size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    for _, group in groupby(trials(size), key=lambda trial: trial.name):
        for trial in group:
            join_world(store, rank, size, trial.parallel)
            figures, tensors = train(
                folder / trial.case, trial.parallel, OBJECTIVES[trial.kind], trial.all_calls, trial.dtype
            )
            keep(folder / trial.id, rank, figures, tensors)
        parallel_state.destroy_model_parallel()
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
