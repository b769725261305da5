"""One of two ranks, each on a GPU of its own if there are two, that train models in a layout.

What came out is written to the folder.

`python -m tests.gpu.ranks RANK FOLDER LAYOUT`, once for each rank; models are in the folder.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from benchmarks.gpu_learner import untuned
from learner.config import ParallelConfig
from learner.model.world import join_world
from tests.gpu.cases import make
from tests.parallel.layouts import OBJECTIVES, layout, reference_of
from tests.parallel.processes import leave
from tests.parallel.rank import keep, train


class Trial(NamedTuple):
    """A model to train."""

    case: str
    dtype: str = "float32"
    kind: str = "terms"
    """Of the objective, see tests/parallel/layouts.py."""

    @property
    def id(self) -> str:
        return "-".join(self)

    def run(self, folder: Path, parallel: ParallelConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Figures, and tensors on rank 0."""
        all_calls = self.kind == "samples"
        where = folder / f"{self.case}-{self.dtype}"
        return train(where, parallel, OBJECTIVES[self.kind], all_calls, self.dtype)


ROUNDED = "bfloat16"
LAYOUTS: dict[str, tuple[ParallelConfig, list[Trial]]] = {
    "TP 2": (
        layout(tensor=2),
        [Trial("qwen3"), Trial("qwen3", kind="samples"), Trial("deepseek_v3"), Trial("qwen3_next", ROUNDED)],
    ),
    "TP 2 EP 2": (layout(tensor=2, expert=2), [Trial("qwen3_moe"), Trial("qwen3_next", ROUNDED)]),
    "PP 2": (
        layout(pipeline=2),
        [Trial("qwen3"), Trial("qwen3", kind="samples"), Trial("moonlight"), Trial("qwen3_next", ROUNDED)],
    ),
    "CP 2": (layout(context=2), [Trial("qwen3", ROUNDED), Trial("qwen3_next", ROUNDED)]),
    "DP 2": (layout(), [Trial("qwen3"), Trial("qwen3_next", ROUNDED)]),
    "DP 2 EP 2": (layout(expert=2), [Trial("qwen3_moe"), Trial("moonlight"), Trial("qwen3_next", ROUNDED)]),
}
"""The models of each layout; in bf16 where kernels take that alone: flash-linear-attention's, and Transformer
Engine's softmax attention with context parallelism."""


def make_models(folder: Path, trials: list[Trial]) -> None:
    """Write the model of each trial, and another, which is its reference model."""
    for case, dtype in {(trial.case, trial.dtype) for trial in trials}:
        where = folder / f"{case}-{dtype}"
        make(case, where, rounded=dtype == ROUNDED)
        other = reference_of(where)
        make(case, other, rounded=dtype == ROUNDED)
        tensors = load_file(other / "model.safetensors")
        save_file({name: tensor * 1.05 for name, tensor in tensors.items()}, other / "model.safetensors")


def main(rank: int, folder: Path, name: str) -> None:
    warnings.simplefilter("ignore")
    untuned()
    parallel, trials = LAYOUTS[name]
    join_world(dist.FileStore(str(folder / "store"), 2), rank, 2, parallel)
    for trial in trials:
        figures, tensors = trial.run(folder, parallel)
        keep(folder / trial.id, rank, figures, tensors)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
