"""Scoring token sequences under weights in folders, for `launch verify`: `python -m learner.rescore`.

One JSON `Job` on standard input, on the last line of standard output a list for each of its folders: the
scores of its sequences, or null for a folder that is not there any more, or not whole.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import msgspec
import torch

from learner.config import ModelConfig
from learner.convert.hf import load_hf
from learner.errors import ModelError
from learner.model.build import build_model
from learner.model.forward import score
from learner.model.hf_config import read_shape
from learner.packing import pack


class Wanted(msgspec.Struct, frozen=True):
    """What is to be scored under one version."""

    folder: str
    """A Hugging Face folder with its weights."""
    sequences: list[list[int]]
    """Token ids, each from its first."""


class Job(msgspec.Struct, frozen=True):
    """What is to be scored."""

    model: ModelConfig
    """The run's; `path` holds its config.json."""
    wanted: list[Wanted]
    """A folder each, scored in this order."""


def rescore(job: Job) -> list[list[list[float]] | None]:
    """For each folder the log-probabilities [T - 1] of each sequence's tokens 1.., at temperature 1.

    Raises `ModelError` for a run's model that cannot be built.
    """
    shape = read_shape(Path(job.model.path))
    model = build_model(shape, getattr(torch, job.model.dtype))
    fit = partial(pack, budget=job.model.micro_batch_tokens)
    found: list[list[list[float]] | None] = []
    for one in job.wanted:
        try:
            load_hf(model, shape, Path(one.folder))
        except (ModelError, OSError):  # a learner removes old versions while it trains
            found.append(None)
            continue
        scores = score(model, one.sequences, fit, 1.0, job.model.logits_chunk)
        found.append([values.tolist() for values in scores])
    return found


def main() -> int:
    """Entry point."""
    try:
        found = rescore(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    print(msgspec.json.encode(found).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
