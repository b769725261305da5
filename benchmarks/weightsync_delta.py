"""How much of a version is new: bytes of a delta against a full push, after real optimizer steps.

    python -m benchmarks.weightsync_delta [--json] [--quick]

A Qwen3 of 100 million parameters (random weights of standard deviation 0.02) is trained on random groups by
the learner's own step, AdamW on fp32. What is exported is rounded to bf16, as an engine in bf16 holds it,
and compared with the version before: the changed words as `weightsync.transports.delta` sends them. A first
step of AdamW moves every weight that has a gradient by the learning rate; the fourth has moments behind it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.harness import parser, progress, report, table
from benchmarks.learner_step import MODELS
from launch.tiny_model import make_tiny_qwen3
from tests.unit.learner.groups import make_group
from weightsync.image import Image, write_image
from weightsync.manifest import Manifest
from weightsync.transports.delta import encode

RATES = (1e-6, 1e-4)
STEPS = (1, 4)
"""Versions that are compared with the one before."""
GROUPS = 2


def bf16(tensors: dict[str, torch.Tensor], version: int) -> tuple[Image, Manifest]:
    """The image of exported tensors, rounded."""
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    return write_image(Manifest.of(version, rounded), rounded)


def compared(before: Image, image: Image, manifest: Manifest) -> dict[str, float]:
    """Parts of the image: words that changed, and bytes of the delta."""
    old, new = memoryview(before.readable()), memoryview(image.readable())
    size = 0
    for chunk in manifest.chunks:
        place = slice(chunk.offset, chunk.offset + chunk.size)
        size += len(encode(old[place], new[place], 2))
    words = (torch.frombuffer(view, dtype=torch.int16) for view in (before.private(), image.private()))
    changed = torch.ne(*words).float().mean().item()
    return {"words": changed, "bytes": size / image.size, "delta_bytes": size, "full_bytes": image.size}


def measure(folder: Path, rate: float) -> dict[int, dict[str, float]]:
    """Of each of `STEPS`, at one learning rate."""
    from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
    from learner.step import Trainer

    optimizer = OptimizerConfig(lr=rate, warmup_steps=0)
    trainer = Trainer(folder, ModelConfig(path=str(folder)), optimizer, ObjectiveConfig())
    image, found = bf16(trainer.export(), 0)[0], dict[int, dict[str, float]]()
    for step in range(max(STEPS)):
        progress(f"learning rate {rate:g}: step {step + 1}")
        groups = [make_group(GROUPS * step + number, (step,), vocabulary=256) for number in range(GROUPS)]
        trainer.train_step(groups, step)
        before, (image, manifest) = image, bf16(trainer.export(), step + 1)
        if step + 1 in STEPS:
            found[step + 1] = compared(before, image, manifest)
        before.close()
    image.close()
    return found


def main() -> None:
    """Entry point."""
    options = parser(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as root:
        shape = MODELS["tiny" if options.quick else "100m"]
        folder = make_tiny_qwen3(Path(root) / "model", seed=0, std=0.02, **shape)
        found = {rate: measure(folder, rate) for rate in RATES}
    rows = [
        [f"{rate:g}", step, f"{one['words']:.2%}", f"{one['bytes']:.2%}"]
        for rate, steps in found.items()
        for step, one in steps.items()
    ]
    report(
        {"rates": {f"{rate:g}": steps for rate, steps in found.items()}},
        table(["learning rate", "step", "words that changed", "bytes of the delta to full"], rows),
        options,
    )


if __name__ == "__main__":
    main()
