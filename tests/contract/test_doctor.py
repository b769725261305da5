"""`launch doctor` names what is wrong with a server; `redis-users` and `redis --users` make users."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffer.acl import ROLES, create_users, with_user
from buffer.client import Stream, library_source
from buffer.connect import connect
from buffer.keys import RUNS
from buffer.local_server import LocalServer, free_port
from launch.cli import main
from launch.doctor import Finding, _way_there, examine, render
from tests.contract.harness import Run
from tests.contract.servers import RawServer


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A private server as we start it, with users and a run."""
    with LocalServer.start(tmp_path_factory.mktemp("sound"), users=True) as server:
        stream = Stream.connect(server.urls["learner"], "demo")
        stream.load_library()
        Run(stream).start()
        stream.redis.sadd(RUNS, "demo")
        stream.close()
        yield server


def wrong(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.found for finding in findings if finding.verdict == "wrong"}


def test_a_private_server_is_sound(sound: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (sound.url, sound.socket_url):
        findings = examine(url)
        assert {finding.verdict for finding in findings} == {"ok"}
        assert [finding.what for finding in findings] == [
            *("connection", "default user", "version", "maxmemory-policy"),
            *("address", "durability", "library", "payload limit of demo"),
        ]
    assert main(["doctor", "--redis", sound.url, "--json"]) == 0
    assert len(msgspec.json.decode(capsys.readouterr().out)) == 8
    assert main(["doctor", "--redis", sound.url]) == 0
    assert capsys.readouterr().out.count("ok     ") == 8


def test_what_a_role_may_not_look_at_is_unknown(sound: LocalServer) -> None:
    for role, url in sound.urls.items():
        findings = {finding.what: finding.verdict for finding in examine(url)}
        assert findings.pop("settings") == "unknown"
        limit = findings.pop("payload limit" if role == "learner" else "payload limit of demo")
        assert limit == "ok" or role == "learner"
        assert set(findings.values()) == {"ok"}


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of which everything is wrong that can be."""
    settings: dict[str, Any] = {
        "port": free_port(),
        "bind": "0.0.0.0",
        "protected-mode": "no",
        "maxmemory": "64mb",
        "maxmemory-policy": "allkeys-lru",
    }
    with RawServer(tmp_path_factory.mktemp("careless"), settings) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


def test_everything_that_is_wrong_is_named(careless: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = wrong(examine(careless))
    assert found == {
        "default user": "anybody who reaches the server may do everything",
        "maxmemory-policy": "allkeys-lru: when memory runs short, Redis deletes keys of runs",
        "address": "bound to 0.0.0.0, protected-mode no",
        "durability": "appendonly no, appendfsync everysec: a crash loses groups that were acknowledged",
        "library": "slipstream2 is not loaded: actors wait",
    }
    assert main(["doctor", "--redis", careless]) == 1
    printed = capsys.readouterr().out
    assert (printed.count("WRONG"), printed.count("       -> ")) == (5, 5)
    assert main(["doctor", "--redis", careless, "--json"]) == 1


@pytest.mark.parametrize(
    ("setting", "value", "cured"),
    [
        ("bind", "127.0.0.1", False),
        ("protected-mode", "yes", False),
        ("appendonly", "yes", False),
        ("appendfsync", "always", False),
        ("maxmemory-policy", "noeviction", True),
    ],
)
def test_one_setting_alone_is_not_enough(setting: str, value: str, cured: bool, careless: str) -> None:
    client = connect(careless)
    before = client.config_get(setting)[setting]
    what = {"bind": "address", "protected-mode": "address"}.get(setting, "durability")
    what = "maxmemory-policy" if setting == "maxmemory-policy" else what
    client.config_set(setting, value)
    assert (what not in wrong(examine(careless))) == cured
    client.config_set(setting, before)
    client.close()


@pytest.mark.parametrize("bind", ["*", "127.0.0.1 ::", "* -::*"])
def test_all_interfaces_have_many_names(bind: str, careless: str) -> None:
    from launch.doctor import _bind

    assert _bind({"bind": bind, "protected-mode": "yes"}).verdict == "wrong"
    assert _bind({"bind": "127.0.0.1 -::1", "protected-mode": "yes"}).verdict == "ok"


def test_payloads_must_fit_into_memory(careless: str) -> None:
    client = connect(careless)
    client.function_load(library_source(), replace=True)
    client.sadd(RUNS, "small", "large", "unbounded", "gone")
    for name, limit in (("small", 48 << 20), ("large", 49 << 20), ("unbounded", 0)):
        Run(Stream(client, name), bytes_limit=limit).start()
    found = {what: said for what, said in wrong(examine(careless)).items() if what.startswith("payload")}
    assert found == {
        "payload limit of gone": "no run {gone} on this server",
        "payload limit of large": "49 MiB, maxmemory is 64 MiB",
        "payload limit of unbounded": "none, maxmemory is 64 MiB",
    }
    assert list(wrong(examine(careless, "large"))).count("payload limit of large") == 1
    assert "payload limit of small" not in wrong(examine(careless, "small"))
    assert "at most 48" in render(examine(careless, "large"))
    client.close()


@pytest.mark.parametrize(
    ("url", "verdict"),
    [
        ("redis://127.0.0.1:1", "ok"),
        ("redis://localhost:1", "ok"),
        ("redis://:x@[::1]:1", "ok"),
        ("unix:///tmp/x.sock", "ok"),
        ("rediss://10.0.0.1:1", "ok"),
        ("redis://10.0.0.1:1", "wrong"),
        ("redis://me:x@redis.example:1", "wrong"),
    ],
)
def test_other_hosts_need_tls(url: str, verdict: str) -> None:
    assert _way_there(url).verdict == verdict


def test_a_server_that_refuses_us_is_a_finding(
    sound: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--redis", with_user(sound.url, "actor", "x")]) == 1
    assert "put user:password of a role into the URL" in capsys.readouterr().out


def test_users_are_made_once_and_printed_once(
    sound: LocalServer, capsys: pytest.CaptureFixture[str], run_name: str
) -> None:
    assert main(["redis-users", "--redis", sound.url, "--run", run_name]) == 0
    printed = capsys.readouterr()
    urls = dict(line.split(": ", 1) for line in printed.out.splitlines())
    assert list(urls) == [f"{role.name}-{run_name}" for role in ROLES]
    assert "no aclfile" in printed.err
    for url in urls.values():
        connect(url).close()
    assert main(["redis-users", "--redis", sound.url, "--run", run_name]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("its password is kept") == len(ROLES)
    assert main(["redis-users", "--redis", sound.urls["learner"], "--run", run_name]) == 2
    assert "takes an administrator" in capsys.readouterr().err
    assert create_users(connect(sound.url), run_name) == {}


def test_a_private_server_writes_a_url_for_each_role(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    argv = [sys.executable, "-m", "launch.cli", "redis", "--users", "--folder", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(1 + len(ROLES))]
        files = {path.stem: path for path in folder.glob("*.url")}
        urls = {name: path.read_text().strip() for name, path in files.items()}
        assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
        assert lines[0] == urls.pop("redis")
        assert lines[1:] == [f"{role.name}: {urls[role.name]}  (in {files[role.name]})" for role in ROLES]
        for name, url in urls.items():
            client = connect(url)
            assert f"redis://{name}:" in url
            client.close()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
    assert list(folder.glob("*.url")) == []
