"""One rank of two that train with Megatron-Core's distributed optimizer, and save and load what it holds.

`python -m tests.parallel.sharded RANK FOLDER DTYPE LAYOUT...`, once for each rank; the model is FOLDER/model.
In the first layout, of data parallelism, two steps are trained and saved, in FOLDER/0; a third one follows,
here and after loading. In every other layout, numbered from 1, that checkpoint is loaded and saved again, and
then the third step trained.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from benchmarks.gpu_learner import untuned
from learner import step
from learner.checkpoint.folder import State, complete
from learner.checkpoint.saver import Saver
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from learner.model.build import data_parallel
from learner.model.cpu import CudaMeansCpu
from learner.model.world import join_world
from learner.step import Trainer
from tests.parallel.processes import leave
from tests.parallel.rank import share, six_groups

LAYOUTS = {
    "DP 2": ParallelConfig(),
    "DP 2 EP 2": ParallelConfig(expert=2),
    "TP 2": ParallelConfig(tensor=2),
    "PP 2": ParallelConfig(pipeline=2),
}


def make_trainer(folder: Path, dtype: str, parallel: ParallelConfig | None = None) -> Trainer:
    """A fresh one of the model in `folder`."""
    parallel = parallel or ParallelConfig()
    model = ModelConfig(path=str(folder), micro_batch_tokens=64, parallel=parallel, dtype=dtype)
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-2, warmup_steps=0, clip_grad=0.1)
    return Trainer(folder / "model", model, optimizer, ObjectiveConfig())


def train(trainer: Trainer) -> None:
    """The next step, on this data-parallel rank's share of the batch."""
    # Megatron-Core takes the norm of the distributed optimizer's gradients on "cuda".
    with nullcontext() if torch.cuda.is_available() else CudaMeansCpu():
        trainer.train_step(share(six_groups()), trainer.version)


def save(trainer: Trainer, folder: Path) -> Path:
    """This rank's part of a checkpoint; where it is, on rank 0."""
    state = State(trainer.version, "d", "d", 1, 0, msgspec.Raw(b"{}"), trainer.optimizer_steps())
    with Saver(folder, rank=dist.get_rank(), ranks=dist.get_world_size()) as saver:
        saver.begin(state.name, trainer.parts(), state)
        written = saver.wait()
    assert written is not None
    assert not written.error, written.error
    dist.barrier()  # rank 0 is the last
    return complete(folder)[0].path


def held(folder: Path, dtype: str, number: int) -> dict[str, torch.Tensor]:
    """All that the checkpoint FOLDER/number holds, by key and place, as a process that is alone reads it."""
    trainer = make_trainer(folder, dtype)
    trainer.load_checkpoint(complete(folder / f"{number}")[0].path)
    assert trainer.version == trainer.optimizer_steps() == 2
    return named(trainer)


def named(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of what a trainer that is alone saves, by key and place."""
    return {f"{part.key} {part.start}": part.tensor.cpu().clone() for part in trainer.parts()}


def write(trainer: Trainer, path: Path) -> None:
    """The weights of all ranks together."""
    tensors = trainer.export()
    if dist.get_rank() == 0:
        save_file(tensors, path)


def main(rank: int, folder: Path, dtype: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        untuned()
    step.data_parallel = partial(data_parallel, sharded=True)  # as on a GPU
    store = dist.FileStore(str(folder / f"store-{dtype}"), 2)
    saved = folder / "0"
    for number, name in enumerate(names):
        join_world(store, rank, 2, LAYOUTS[name])
        trainer = make_trainer(folder, dtype, LAYOUTS[name])
        if number:
            trainer.load_checkpoint(saved)
            save(trainer, folder / f"{number}")
        else:
            for _ in range(2):
                train(trainer)
            saved = save(trainer, folder / "0")
            again = make_trainer(folder, dtype, LAYOUTS[name])
            again.load_checkpoint(saved)
            train(again)
            write(again, folder / "again.safetensors")
        train(trainer)
        write(trainer, folder / f"{number}.safetensors")
        parallel_state.destroy_model_parallel()
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
