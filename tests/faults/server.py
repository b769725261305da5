"""A Redis that can be killed, stopped, given an older copy of its data or no more disk, on the same port."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
from pathlib import Path
from typing import Self
from unittest import mock

import redis

from buffer.local_server import LocalServer
from buffer.process import end_with_parent

PASSWORD = "of-the-tests"


class Server:
    """A private server that outlives its processes: same folder, port and password each time."""

    def __init__(self, folder: Path, *, appendfsync: str = "always") -> None:
        self.folder, self.appendfsync, self.port = folder, appendfsync, _port()
        self._local = self._start()

    def _start(self) -> LocalServer:
        with mock.patch("buffer.local_server.end_with_parent", _prepare):
            return LocalServer.start(
                self.folder, port=self.port, appendfsync=self.appendfsync, password=PASSWORD
            )

    @property
    def url(self) -> str:
        """Its URL; sockets time out after 1 s, so that tests need not wait for 5."""
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """The same through a proxy."""
        return f"redis://:{PASSWORD}@127.0.0.1:{port}/0?socket_timeout=1&socket_connect_timeout=1"

    @property
    def redis(self) -> redis.Redis:
        """A client for the test's own looks."""
        return redis.Redis.from_url(self.url)

    def kill(self) -> None:
        """kill -9."""
        self._local.process.kill()
        self._local.stop()  # reaps it and removes the socket

    def start(self) -> None:
        """Starts it again on what is in the folder."""
        self._local = self._start()

    def hang(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        os.kill(self._local.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self._local.process.pid, signal.SIGCONT)

    def fill_disk(self, left: int) -> int:
        """Its files cannot grow by more than `left` bytes, for as long as it lives; waits for its end, and
        returns its exit code."""
        size = max(path.stat().st_size for path in (self.folder / "appendonlydir").iterdir())
        limits = (size + left, resource.RLIM_INFINITY)
        resource.prlimit(self._local.process.pid, resource.RLIMIT_FSIZE, limits)
        code = self._local.process.wait(30)
        self._local.stop()  # removes the socket
        return code

    def copy(self, to: Path) -> None:
        """A copy of its data as of now."""
        self.hang()
        shutil.copytree(self.folder / "appendonlydir", to)
        self.go_on()

    def restore(self, older: Path) -> None:
        """kill -9, then a start from an older copy."""
        self.kill()
        shutil.rmtree(self.folder / "appendonlydir")
        shutil.copytree(older, self.folder / "appendonlydir")
        self.start()

    def wipe(self) -> None:
        """kill -9, then a start with nothing."""
        self.kill()
        shutil.rmtree(self.folder / "appendonlydir")
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._local.process.kill()
        self._local.stop()


def _prepare() -> None:
    """As every server starts; and a write beyond a limit fails with an error, as on a full disk."""
    end_with_parent()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _port() -> int:
    """A free port below those that the kernel gives to clients: else one of these, connecting to the
    port while no server listens, can be given that very port and connect to itself."""
    draw = random.Random(os.getpid())
    while True:
        port = draw.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
