"""`launch verify` and `launch inspect` on runs that are sound, damaged by hand, or have dead letters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffer.admission import Drop
from buffer.client import Stream
from buffer.keys import RUNS
from buffer.local_server import LocalServer
from launch.cli import main
from tests.contract.harness import Run


@pytest.fixture
def run(stream: Stream) -> Run:
    """B = 2, eta = 1: a trained step, an assigned one, a queued group and a lease."""
    run = Run(stream, batch=2, eta=1, attempts_max=1).start("a")
    stream.redis.sadd(RUNS, stream.run)
    for step in range(2):
        run.queue("a", 2)
        run.assign(step)
        run.commit(1) if step == 0 else None
    run.applied("a", 1)
    run.queue("a", 1)
    run.leases("a", 1)
    return run


def launch(server: LocalServer, run: Run, *argv: str) -> int:
    return main([argv[0], "--redis", server.url, "--run", run.stream.run, *argv[1:]])


def put(run: Run, name: str, field: str, value: Any) -> None:
    run.stream.redis.hset(run.stream.key(name), field, value)


def twice(run: Run) -> None:
    manifest = run.stream.redis.hget(run.stream.key("manifests"), "0")
    put(run, "manifests", "5", manifest)


DAMAGE: dict[str, tuple[Callable[[Run], None], str]] = {
    "a group nobody accounts for": (lambda run: put(run, "counts", "admitted", 7), "is not conserved"),
    "a broken call": (lambda run: put(run, "state", "journal", "x"), "a call broke off"),
    "too old": (lambda run: put(run, "staleness", "2", 1), "staleness 2 was trained, the bound is 1"),
    "a wrong deadline": (lambda run: put(run, "outstanding", "2", 9), "outstanding groups by deadline: the"),
    "a lost lease": (
        lambda run: run.stream.redis.delete(run.stream.key("leased")) and None,
        "leased groups: the ledger says 1, there are 0",
    ),
    "a lost queue": (
        lambda run: run.stream.redis.delete(run.stream.key("ready")) and None,
        "queued groups: the ledger says 1, there are 0",
    ),
    "more than can be met": (lambda run: put(run, "state", "cap", 1) or put(run, "state", "batch", 1), ""),
    "trained twice": (twice, "is in 2 manifests"),
    "queued and assigned": (
        lambda run: run.stream.redis.zadd(run.stream.key("ready"), {"0000-0000000000-00": 2}) and None,
        "group 0000-0000000000-00 is queued and assigned",
    ),
    "assigned too late": (
        lambda run: put(run, "manifests", "9", b'{"rows": [["g", "1-1", 0, 7]], "strikes": {}}'),
        "group g of step 9 has version_min 0, more than 1 steps older",
    ),
}


def test_a_sound_run_is_proven(
    redis_server: LocalServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(redis_server, run, "verify") == 0
    page = capsys.readouterr().out
    assert "6 admitted = 1 leased + 1 queued + 2 assigned + 2 trained + 0 dropped" in page
    assert page.splitlines()[-1] == "holds      nothing lost, nothing trained twice, nothing too old"


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_hold_is_named_and_ends_with_1(
    redis_server: LocalServer, run: Run, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = DAMAGE[damage]
    change(run)
    if damage == "more than can be met":
        run.stream.redis.hset(run.stream.key("state"), "head", 2)
        said = "2 groups are due by step 2, which has room for 1"
    assert launch(redis_server, run, "verify", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["holds"]
    assert any(said in problem for problem in found["violations"]), found["violations"]
    assert launch(redis_server, run, "verify") == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_dead_letters_are_listed_saved_and_put_back(
    redis_server: LocalServer, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(redis_server, run, "inspect", "--dead") == 0
    assert capsys.readouterr().out == "no dead letters\n"
    group = run.assign(1).manifest.groups()[0].group
    run.strike(1, group, payload=b"broken")
    lease = run.heartbeat("a")
    assert lease.lost == []
    token = next(iter(msgspec.convert(run.stream.redis.hkeys(run.stream.key("leased")), list[bytes])))
    run.stream.call(Drop("a", run.epochs["a"], token.decode(), "reward"))
    assert launch(redis_server, run, "inspect", "--dead", "--json", "--out", str(tmp_path)) == 0
    poison, reward = json.loads(capsys.readouterr().out)
    assert (poison["reason"], poison["payload_bytes"], poison["group"]) == ("poison", 6, group)
    assert poison["problem"].startswith("magic: got b'brok'")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"broken"]
    assert (reward["reason"], reward["row"], reward["prompt_tokens"]) == ("reward", 5, 1)
    assert launch(redis_server, run, "inspect", "--requeue", reward["entry"]) == 0
    assert "the prompt at position 5 waits in the queue again" in capsys.readouterr().out
    assert launch(redis_server, run, "inspect", "--requeue", reward["entry"]) == 2
    assert "has no dead letter" in capsys.readouterr().err
    assert launch(redis_server, run, "inspect") == 2
    assert "give --dead, or --requeue ENTRY" in capsys.readouterr().err
