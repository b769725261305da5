"""The process that writes the real learner's checkpoints, with points at which it kills the learner.

It dies with it. Its points, in order: `ckpt-begin ckpt-half ckpt-tensors ckpt-index ckpt-state ckpt-synced
ckpt-renamed`. After SLIPSTREAM_FULL_AFTER checkpoints no file of its grows beyond a few bytes any more, as
on a disk that is full.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import learner.checkpoint.writer as writer
from tests.faults.points import Faults

_FULL = 100_000
"""Bytes a file may have once the disk is full; the tiny model's pieces are megabytes."""


class KillsParent(Faults):
    """The faults of this process's parent, the learner."""

    def at(self, point: str) -> None:
        """Passes a point; or the learner, and with it this process, is killed, or stopped."""
        if action := self.wanted(point):
            os.kill(os.getppid(), action)
            if action == signal.SIGKILL:
                time.sleep(60)


def watch(faults: KillsParent) -> None:
    """Puts the points around the writer's calls."""

    def around(name: str, before: str = "", after: str = "") -> None:
        function: Callable[..., Any] = getattr(writer, name)

        def wrapped(*args: Any) -> Any:
            if before:
                faults.at(before)
            answer = function(*args)
            if after:
                faults.at(after)
            return answer

        setattr(writer, name, wrapped)

    def half(path: Any, tensors: Iterator[Any]) -> Any:
        def some() -> Iterator[Any]:
            for number, one in enumerate(tensors):
                if number == 20:
                    faults.at("ckpt-half")
                yield one

        return pieces(path, some())

    def synced(folder: Any) -> None:
        sync(folder)
        if folder.name.startswith("."):  # not yet its name
            faults.at("ckpt-synced")

    sync = writer.sync
    pieces, writer.write_pieces = writer.write_pieces, half
    around("write_rank", "ckpt-begin", "ckpt-tensors")
    around("write_checkpoint_index", after="ckpt-index")
    around("write_whole", after="ckpt-state")
    around("publish", after="ckpt-renamed")
    writer.sync = synced


def fill_the_disk(after: int) -> None:
    """Lets so many checkpoints be written, and no more."""
    written, write = [0], writer.write

    def limited(job: Any, fd: int) -> None:
        if written[0] == after:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with an error
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL, _FULL))
        written[0] += 1
        write(job, fd)

    writer.write = limited


if __name__ == "__main__":
    watch(KillsParent("learner"))
    if after := int(os.environ.get("SLIPSTREAM_FULL_AFTER", "0")):
        fill_the_disk(after)
    sys.exit(writer.main())
