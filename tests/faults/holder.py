"""Holders of one version that die at a chunk: `python -m tests.faults.holder NUMBER CHUNKS`.

For each chunk two processes, forked by one that has imported everything: one is killed when it is to
send that chunk, the other is stopped. Each prints its offer's manifest and sources, one JSON line, when it is
ready; all of them end with standard input.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import BinaryIO

import msgspec

from buffer.process import end_with_parent
from tests.unit.weightsync.versions import CHUNK, version
from weightsync.holder import Holder
from weightsync.image import chunk_ranges
from weightsync.protocol import Source


class Ready(msgspec.Struct):
    """What a holder prints."""

    pid: int
    chunk: int
    action: str
    """`kill` or `stop`."""
    sources: list[Source]


class Dying(Holder):
    """Reaches its end at the n-th chunk that it sends, from 0."""

    def __init__(self, chunk: int, action: str) -> None:
        super().__init__("127.0.0.1")
        self._left, self._signal = chunk, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action]

    def send(self, connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
        for offset, size in chunk_ranges(count, CHUNK):
            if self._left == 0:
                os.kill(os.getpid(), self._signal)
                threading.Event().wait()  # a stop takes a moment to reach this thread
            self._left -= 1
            super().send(connection, image, first + offset, size)


def hold(number: int, chunk: int, action: str) -> None:
    """A holder until it is ended."""
    end_with_parent()
    image, manifest = version(number)
    holder = Dying(chunk, action)
    holder.keep(manifest, image)
    line = msgspec.json.encode(Ready(os.getpid(), chunk, action, holder.sources(manifest.label)))
    os.write(1, line + b"\n")
    signal.pause()


def main() -> None:
    """Entry point of the process."""
    end_with_parent()
    number, chunks = int(sys.argv[1]), int(sys.argv[2])
    children = []
    for chunk in range(chunks):
        for action in ("kill", "stop"):
            pid = os.fork()
            if pid == 0:
                hold(number, chunk, action)
            children.append(pid)
    sys.stdin.read()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
