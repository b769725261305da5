"""An engine's process, without SGLang: a model on a GPU, our loader, one ticket a line.

    python -m tests.gpu.engine FOLDER [CARD]      # the loader's folder, the model's card

It answers each line with whether every tensor is the version's whose seed the line names, or was left alone.
"""

from __future__ import annotations

import os
import sys

import torch

from tests.gpu.shapes import Fused, exported, place
from weightsync.loader import load
from weightsync.ticket import FOLDER


def holds(model: Fused, seed: int) -> bool:
    """Whether a model holds exactly a version."""
    for name, tensor in exported(seed).items():
        own, row = place(name)
        found = model.get_parameter(own.replace(".", "/"))[row : row + tensor.shape[0]]
        if not torch.equal(found.cpu(), tensor):
            return False
    return True


def main() -> None:
    """Entry point."""
    os.environ[FOLDER] = sys.argv[1]
    model = Fused(torch.device("cuda", int(sys.argv[2])))
    torch.cuda.synchronize()
    print("ready", flush=True)
    for line in sys.stdin:
        load(model, [])
        print(holds(model, int(line)), flush=True)


if __name__ == "__main__":
    main()
