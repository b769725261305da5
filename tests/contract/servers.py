"""Servers with a configuration of the test's own, started, killed and started again on the same port."""

from __future__ import annotations

import subprocess
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from buffer.errors import RedisUnavailable
from buffer.local_server import find_program
from buffer.process import end_with_parent
from tests.waiting import wait_until


class RawServer:
    """A server program with the settings it is given; `url` is set by whoever knows its users.

    with RawServer(tmp_path, {"port": free_port()}) as server:
        redis.Redis(port=server.port)
    """

    def __init__(self, folder: Path, settings: dict[str, object], *lines: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.bus = int(str(settings["port"])), int(str(settings.get("cluster-port", 0)))
        self._log = folder / "redis.log"
        common = {"bind": "127.0.0.1", "dir": folder, "logfile": self._log, "save": '""'}
        rows = [f"{name} {value}" for name, value in {**common, **settings}.items()]
        self._text = "\n".join([*rows, *lines, ""])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> RawServer:
        """Starts it and waits until it listens. Raises `RedisUnavailable` if it ends instead."""
        self.process = subprocess.Popen(
            [find_program(), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self._text.encode())
        self.process.stdin.close()
        wait_until(self._listens, 20, f"a server on port {self.port}", pause=0.02)
        return self

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            lines = self._log.read_text().splitlines() if self._log.exists() else ["no log"]
            raise RedisUnavailable(f"the server did not start: {' | '.join(lines[-3:])}")
        try:
            redis.Redis(port=self.port, socket_timeout=1, retry=Retry(NoBackoff(), 0)).info("server")
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        return True

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    close = kill

    def __enter__(self) -> RawServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
