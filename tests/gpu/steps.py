"""Two optimizer steps on a checkpoint, on whatever the host has; the CPU's half runs in its own process.

python -m tests.gpu.steps CHECKPOINT OUT      # on the CPU: figures to OUT/metrics.json, weights beside
python -m tests.gpu.steps --read FOLDER DTYPE OUT    # what a checkpoint of tests/parallel/sharded.py holds
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BLOCKED = ("fla", "transformer_engine", "causal_conv1d", "mamba_ssm")
"""Packages that may not load without a GPU."""


def on_cpu(folder: Path, out: Path) -> dict[str, float | None]:
    """Train in a process that sees no GPU; its figures."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.steps", str(folder), str(out)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    return json.loads((out / "metrics.json").read_text())


def train(folder: Path, out: Path, dtype: str = "float32") -> dict[str, float | None]:
    """Two steps of a few groups; the second one's figures, and the weights in `out`."""
    from learner.config import KlConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
    from learner.step import Trainer
    from tests.unit.learner.groups import make_group

    # With so large an epsilon an update is nearly proportional to the gradient: Adam's own first step
    # is +-lr for every weight, however small its gradient.
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-2, warmup_steps=0, clip_grad=0.5)
    objective = ObjectiveConfig(entropy=0.01, kl=KlConfig(coefficient=0.1, where="loss", estimator="k3"))
    model = ModelConfig(path=str(folder), micro_batch_tokens=64, dtype=dtype)
    trainer = Trainer(folder, model, optimizer, objective)
    for step in range(2):
        groups = [make_group(position, seed=step) for position in range(4)]
        metrics = trainer.train_step(groups, step)
    trainer.save(out)
    found = {
        name: value for name, value in metrics.items() if not name.startswith(("seconds", "tflops", "mfu"))
    }
    (out / "metrics.json").write_text(json.dumps(found))
    return found


def read(folder: Path, dtype: str, out: Path) -> None:
    """What the first layout's checkpoint holds, to the file `out`."""
    from safetensors.torch import save_file

    from tests.parallel.sharded import held

    save_file(held(folder, dtype, 0), out)


if __name__ == "__main__":
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    if sys.argv[1] == "--read":
        read(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        train(Path(sys.argv[1]), Path(sys.argv[2]))
