"""How much of a GPU's arithmetic a step uses for the model: model FLOPs utilisation.

    mfu = FLOPs of the model / (seconds of the step * GPUs * FLOP/s of one GPU at its best)

FLOPs of the model are those of `learner.flops` for the sequences that were trained: nothing for padding, for
what a backward pass computes again, or for scores before the step. The time is all of the step's. The
definition is that of PaLM (arXiv 2204.02311, appendix B).

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA H100 PCIe"), peak_tflops("Some GPU")
    (989.4, 756.0, None)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from learner.config import ModelConfig
from learner.flops import Cost, cost_of
from learner.metrics import Metrics
from learner.model.shape import Shape
from learner.packing import MicroBatch

PEAKS: dict[str, float] = {
    "A100": 312.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "B200": 2250.0,
    "L40S": 362.05,
    "L4": 121.0,
}
"""Dense bf16 TFLOP/s of a card by words of its name, from NVIDIA's data sheets, which give most of them with
sparsity: half of that. The row with the most words that all stand in the name counts."""


@dataclass(frozen=True)
class Utilisation:
    """What turns a step's FLOPs into figures."""

    cost: Cost | None
    """Of the model; None: not known for its layers."""
    peak: float | None
    """TFLOP/s of one rank's GPU; None: no GPU, or one that is not known."""
    ranks: int
    """All ranks of the world."""

    @classmethod
    def of(cls, config: ModelConfig, shape: Shape) -> Utilisation:
        """That of this world's ranks, which are all on cards of one kind."""
        peak = None
        if torch.cuda.is_available():
            table = peak_tflops(torch.cuda.get_device_name()) if config.dtype == "bfloat16" else None
            peak = config.peak_tflops or table
        return cls(None if shape.hybrid is not None else cost_of(shape), peak, dist.get_world_size())

    def flops(self, batch: MicroBatch) -> float:
        """FLOPs of forward and backward pass over a micro-batch; 0 where they are not known."""
        if self.cost is None:
            return 0.0
        lengths = np.diff(batch.cu_seqlens.numpy())
        targets = np.bincount(batch.sample.numpy(), minlength=len(lengths))
        return float(self.cost.flops(lengths, targets).sum())

    def figures(self, flops: float, seconds: float) -> Metrics:
        """`tflops` and `mfu` of a step in which all ranks together computed `flops` in `seconds`."""
        if self.cost is None:
            return {"tflops": None, "mfu": None}
        tflops = flops / seconds / self.ranks / 1e12
        return {"tflops": tflops, "mfu": tflops / self.peak if self.peak else None}


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of the card that CUDA calls `name`; None if it is not known."""
    words = set(re.findall(r"\w+", name))
    found = [row for row in PEAKS if words.issuperset(row.split())]
    return PEAKS[max(found, key=len)] if found else None
