"""Checkpoint folders: `step-<version>-<epoch>`, complete once they have their name.

    checkpoints/
      step-00000020-1/
        __0_0.distcp   rank 0's pieces of weights and optimizer state
        .metadata, metadata.json, common_0.distcp   Megatron-Core's index of all ranks' pieces
        __0_0.xxh3     digest of that file: torch does not notice a flipped bit
        rank-0.json    where that rank's pieces lie
        random-0.bin   state of that rank's random generator
        state.json     version, digest, lineage, and the session's memory

A folder is written under another name, synced and renamed last. Which of the complete ones a run goes on
from is decided by digests: it must be of a version that Redis has as committed.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import msgspec
import xxhash

from learner.config import CheckpointConfig
from learner.errors import CheckpointError

log = logging.getLogger("learner")

FORMAT = 1
"""Version of the layout above."""
_BLOCK = 1 << 20
_UNFINISHED = ".unfinished-"


class State(msgspec.Struct, frozen=True):
    """`state.json`."""

    version: int
    """Optimizer steps behind the weights."""
    digest: str
    """Of the version, as committed."""
    weights: str
    """Of the exported weights that are saved: another one if the version was trained again and came out
    differently, as it may on a GPU."""
    epoch: int
    """Number of the learner's epoch that wrote it."""
    lineage: int
    """Of the run, when it was saved."""
    memory: msgspec.Raw
    """`Session.memory()` of then: manifests, digests, head and prompt cursor."""
    optimizer_steps: int = 0
    """Updates behind the optimizer's moments; 0: none was made, there are none."""
    format: int = FORMAT
    """Version of the folder's layout; another one is refused."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step-{self.version:08d}-{self.epoch}"


class Checkpoint(msgspec.Struct, frozen=True):
    """A complete checkpoint."""

    path: Path
    """Its folder."""
    state: State
    """What its `state.json` says."""

    @property
    def version(self) -> int:
        """Optimizer steps behind its weights."""
        return self.state.version


def complete(folder: Path) -> list[Checkpoint]:
    """Every complete checkpoint, newest first. Raises `CheckpointError` for one that cannot be read."""
    found = [Checkpoint(path, read_state(path)) for _, path in _named(folder)]
    return sorted(found, key=lambda one: (one.state.lineage, one.version, one.state.epoch), reverse=True)


def read_state(path: Path) -> State:
    """`state.json` of a checkpoint. Raises `CheckpointError`."""
    try:
        state = msgspec.json.decode((path / "state.json").read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a learner: {error}; move it away") from error
    if state.format != FORMAT:
        raise CheckpointError(f"{path}: got format {state.format}, this release reads {FORMAT}")
    return state


def pieces_file(rank: int) -> str:
    """Name of the file with a rank's pieces."""
    return f"__{rank}_0.distcp"


def digest_of(path: Path) -> str:
    """xxh3-128 of a file, hex."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def check_files(path: Path) -> None:
    """Raises `CheckpointError` unless every rank's pieces are as they were written."""
    for file in sorted(path.glob("*.xxh3")):
        pieces = file.with_suffix(".distcp")
        try:
            found, expected = digest_of(pieces), file.read_text()
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if found != expected:
            raise CheckpointError(f"{pieces}: got digest {found}, it was written with {expected}")


def unfinished(folder: Path, name: str) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder / f"{_UNFINISHED}{name}"


def remove_unfinished(folder: Path) -> None:
    """Removes what earlier learners did not finish. One that still writes there fails, as it should."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def oldest_kept(folder: Path, config: CheckpointConfig, newest: int) -> int:
    """Version of the oldest checkpoint, up to `newest`, that a run may go on from without a fork."""
    # By name alone: another learner may have pruned what this one wrote. It then hears at its next call
    # that it is fenced, which says more than a missing file.
    versions = sorted({newest, *(version for version, _ in _named(folder) if version < newest)})
    return versions[-config.keep_last :][0]


def prune(folder: Path, config: CheckpointConfig, oldest: int) -> None:
    """Removes checkpoints older than `oldest`, but for the archived ones."""
    for version, path in _named(folder):
        archived = config.keep_every and version % config.keep_every == 0
        if version < oldest and not archived:
            remove(path)


def remove(path: Path) -> None:
    """Removes a checkpoint. It loses its name first: a kill in between must not leave half of one."""
    gone = unfinished(path.parent, path.name)
    path.rename(gone)
    shutil.rmtree(gone)


def set_aside(path: Path, reason: str) -> None:
    """Takes a checkpoint that cannot be loaded out of the count; it stays to be looked at."""
    aside = path.with_name(f"damaged-{path.name}")
    log.warning("%s is passed over and kept as %s: %s", path.name, aside, reason)
    path.rename(aside)


def random_file(rank: int) -> str:
    """Name of the file with the state of a rank's random generator."""
    return f"random-{rank}.bin"


def sync(path: Path) -> None:
    """Has a file's bytes, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(folder: Path) -> list[tuple[int, Path]]:
    """(version, path) of every complete checkpoint."""
    return [(int(path.name.split("-")[1]), path) for path in folder.glob("step-*-*")]
