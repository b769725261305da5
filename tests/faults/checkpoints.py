"""Checkpoints of the scripted learner: a folder a version, complete once it has its name.

`step-<version>-<epoch>` holds `weights.npy` and `memory.json`. It is written beside its place, synced,
and renamed last; only then is it committed. A kill between any two of these leaves a folder that is
never taken, or one that is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import numpy as np

from tests.faults.points import Faults


class Saved(msgspec.Struct, frozen=True):
    """A complete checkpoint."""

    version: int
    epoch: int
    folder: Path

    def weights(self) -> np.ndarray:
        """float32: the weights of the version."""
        return np.load(self.folder / "weights.npy")

    def memory(self) -> bytes:
        """`Session.memory()` of then."""
        return (self.folder / "memory.json").read_bytes()


def saved(folder: Path) -> list[Saved]:
    """Every complete checkpoint, newest first."""
    found = []
    for path in folder.glob("step-*-*"):
        _, version, epoch = path.name.split("-")
        found.append(Saved(int(version), int(epoch), path))
    return sorted(found, key=lambda one: (one.version, one.epoch), reverse=True)


def write(folder: Path, version: int, epoch: int, weights: np.ndarray, memory: bytes, faults: Faults) -> None:
    """Writes a checkpoint and gives it its name last."""
    name = f"step-{version:06d}-{epoch}"
    unfinished = folder / f".unfinished-{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    faults.at("ckpt-begin")
    with (unfinished / "weights.npy").open("wb") as file:
        np.save(file, weights)
        file.flush()
        faults.at("ckpt-weights")  # written, not synced, the memory missing
        os.fsync(file.fileno())
    with (unfinished / "memory.json").open("wb") as file:
        file.write(memory[: len(memory) // 2])
        file.flush()
        faults.at("ckpt-half")
        file.write(memory[len(memory) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    _sync(unfinished)
    faults.at("ckpt-synced")
    if not (folder / name).exists():
        unfinished.rename(folder / name)
    _sync(folder)
    faults.at("ckpt-renamed")  # complete, not committed


def prune(folder: Path, oldest: int) -> None:
    """Removes checkpoints older than this version."""
    for one in saved(folder):
        if one.version < oldest:
            shutil.rmtree(one.folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
