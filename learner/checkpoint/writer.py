"""The process that writes checkpoints: `python -m learner.checkpoint.writer FD PARENT`.

One JSON line a checkpoint on standard input, one on standard output when it is complete or failed. What
is written lies in shared memory, the file descriptor FD. The process dies with its parent, of pid PARENT.
Each rank has one; that of rank 0 waits for the others' files, writes the index and names the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from buffer.process import end_with_parent
from learner.checkpoint.folder import State, digest_of, pieces_file, random_file, sync, unfinished
from learner.checkpoint.snapshot import Slot, snapshot_map
from learner.convert.dist_checkpoint import Piece, write_checkpoint_index, write_pieces

_OTHERS_S = 600.0
"""How long rank 0 waits for the files of the other ranks."""
_LOOK_S = 0.05


class Job(msgspec.Struct, frozen=True):
    """A checkpoint to write."""

    folder: str
    """Folder of all checkpoints."""
    name: str
    """Name of this one."""
    state: State | None
    """What rank 0 writes beside the pieces; the others have none."""
    rank: int
    """Of the learner's process, from 0."""
    ranks: int
    """How many of them write pieces of this checkpoint."""
    slots: list[Slot]
    """This rank's pieces, in the shared memory."""
    random: bytes
    """State of torch's generator."""


class Written(msgspec.Struct, frozen=True):
    """What became of a checkpoint."""

    error: str
    """Why it is not complete, empty if it is."""
    seconds: float
    """How long writing took."""


def write(job: Job, fd: int) -> None:
    """Writes this rank's share of a checkpoint; on rank 0 makes it a whole one. Raises `OSError`."""
    folder = Path(job.folder)
    beside = unfinished(folder, job.name)
    beside.mkdir(parents=True, exist_ok=True)
    write_rank(job, beside, fd)
    if job.rank == 0:
        write_whole(job, beside)
        publish(beside, folder / job.name)


def write_rank(job: Job, beside: Path, fd: int) -> None:
    """The pieces, and then what says that they are all there."""
    memory = snapshot_map(fd)

    def tensors() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
        for slot in job.slots:
            yield slot.key, slot.shape, slot.start, slot.view(memory)

    path = beside / pieces_file(job.rank)
    pieces = write_pieces(path, tensors())
    _sync(path)
    _write(path.with_suffix(".xxh3"), digest_of(path).encode())
    _write(beside / random_file(job.rank), job.random)
    _write(beside / f"rank-{job.rank}.json", msgspec.json.encode(pieces))


def write_whole(job: Job, beside: Path) -> None:
    """The index over all ranks' pieces, and the state. Raises `OSError` if a rank does not come."""
    files = [beside / f"rank-{rank}.json" for rank in range(job.ranks)]
    deadline = time.monotonic() + _OTHERS_S
    while missing := [path.name for path in files if not path.exists()]:
        if time.monotonic() > deadline:
            raise OSError(f"{', '.join(missing)} did not come within {_OTHERS_S:.0f} s")
        time.sleep(_LOOK_S)
    pieces = [msgspec.json.decode(path.read_bytes(), type=list[Piece]) for path in files]
    write_checkpoint_index(beside, [piece for of_rank in pieces for piece in of_rank])
    _write(beside / "state.json", msgspec.json.format(msgspec.json.encode(job.state), indent=2))


def publish(beside: Path, path: Path) -> None:
    """Syncs everything and gives the folder its name; one of that name that is there is as good."""
    for file in beside.iterdir():
        _sync(file)
    sync(beside)
    if path.exists():
        shutil.rmtree(beside)
    else:
        beside.rename(path)
        sync(path.parent)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    """A file that is there only once it is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    _sync(partial)
    partial.rename(path)


def main() -> int:
    """Writes what it is told until its parent closes the pipe, or dies."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return 0  # it died before that
    torch.set_num_threads(1)
    os.nice(5)  # it has until the next checkpoint; the step has not
    fd = int(sys.argv[1])
    for line in sys.stdin.buffer:
        job, began, error = msgspec.json.decode(line, type=Job), time.monotonic(), ""
        try:
            write(job, fd)
        except (OSError, RuntimeError) as problem:  # torch says RuntimeError for a disk that is full
            error = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
            shutil.rmtree(unfinished(Path(job.folder), job.name), ignore_errors=True)
        written = Written(error, time.monotonic() - began)
        sys.stdout.buffer.write(msgspec.json.encode(written) + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
