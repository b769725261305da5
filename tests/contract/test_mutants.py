"""The suite notices broken rules: each mutant of `functions.lua` must fail a script or a random walk.

A mutant is one replacement that matches exactly once, so a rule that is rewritten must be mutated
anew here. The unchanged library passes all of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files

import msgspec
import pytest

from buffer.client import Stream
from buffer.errors import StreamError
from buffer.local_server import LocalServer
from tests.contract.scripts import SCRIPTS, random_walk, scripted_walk

SEEDS = range(10)
STEPS = 150

MUTANTS = {
    "admission range stops before the head's newest deadline": (
        "for d = deadline, S.head + S.eta do",
        "for d = deadline, S.head + S.eta - 1 do",
    ),
    "admission counts one group too few": (
        "if out(d) + 1 > (d - S.head + 1) * S.batch then return 'full' end",
        "if out(d) > (d - S.head + 1) * S.batch then return 'full' end",
    ),
    "admission knows no end of the run": (
        "if out(math.huge) + 1 > (S.max_steps - S.head) * S.batch then return 'enough' end",
        "",
    ),
    "an actor with old weights gets a lease": (
        "if deadline < S.head then return 'old-weights' end",
        "deadline = math.max(deadline, S.head)",
    ),
    "the deadline ignores the actor's version": (
        "local deadline = math.min(version, S.head) + S.eta",
        "local deadline = S.head + S.eta",
    ),
    "a repeated admission is a new one": (
        "if last[1] == request then return last[2] end",
        "",
    ),
    "an unsafe batch is assigned": (
        "if out(d) - taken > (d - S.head) * S.batch then return wait('wait', 'unsafe') end",
        "",
    ),
    "batches go by group id, not by deadline": (
        "redis.call('ZADD', K.ready, lease.deadline, group)",
        "redis.call('ZADD', K.ready, 0, group)",
    ),
    "the clock follows the server's without a bound": (
        "math.max(0, math.min(1000, now - S.last))",
        "(now - S.last)",
    ),
    "a lease that ends does not return its prompt": (
        "redis.call('LPUSH', K.prompts, lease.position .. ' ' .. attempt)",
        "local _ = attempt",
    ),
    "a prompt that returns goes to the tail": (
        "redis.call('LPUSH', K.prompts, lease.position",
        "redis.call('RPUSH', K.prompts, lease.position",
    ),
    "a prompt is never retired": ("if attempt < S.attempts_max then", "if true then"),
    "publish takes any digest": (
        "and version and redis.call('HGET', K.versions, version) == digest",
        "and version",
    ),
    "publish believes the caller's version_min": ("sound = sound and lowest == version_min", ""),
    "publish takes groups older than the lease": ("version_min >= lease.version", "true"),
    "publish takes another group's id": ("local sound = lease.group == group and", "local sound ="),
    "a refused payload stays": (
        "    redis.call('XDEL', K.stream, entry)\n    return cmsgpack.pack({ status, reason, '' })",
        "    return cmsgpack.pack({ status, reason, '' })",
    ),
    "a repeated publish keeps its payload": (
        "      redis.call('XDEL', K.stream, entry)\n      return cmsgpack.pack({ 'ok', 'repeat'",
        "      return cmsgpack.pack({ 'ok', 'repeat'",
    ),
    "no epoch fences anybody": ("  if current ~= epoch then", "  if false then"),
    "publish knows no epoch": (
        "if redis.call('HGET', K.epochs, 'actor:' .. name) ~= args[2] then",
        "if false then",
    ),
    "applied takes any digest": ("if digest ~= args[4] then", "if not digest then"),
    "a heartbeat renews nothing": (
        "redis.call('ZADD', K.leases, S.clock + S.lease_ms, args[i])",
        "local _ = S.lease_ms",
    ),
    "payloads are never deleted": ("        redis.call('XDEL', K.stream, row[2])\n", ""),
    "an actor that leaves keeps its leases": ("if lease.actor == name then", "if false then"),
}
"""Broken rule -> (text of the library, what stands there instead)."""


@pytest.fixture(scope="module")
def mutant_stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stream]:
    """A connection to a server of its own: a mutant must not reach other tests."""
    with LocalServer.start(tmp_path_factory.mktemp("mutants"), appendfsync="everysec") as server:
        stream = Stream.connect(server.socket_url, "mutants", patience_s=1.0)
        yield stream
        stream.close()


def _suite(stream: Stream) -> Iterator[Callable[[], None]]:
    for name in SCRIPTS:
        yield partial(scripted_walk, _fresh(stream), name)
    for seed in SEEDS:
        yield partial(random_walk, _fresh(stream), seed, STEPS)


def _fresh(stream: Stream) -> Stream:
    return Stream(stream.redis, f"walk-{secrets.token_hex(4)}", patience_s=1.0)


def _fails(walk: Callable[[], None]) -> bool:
    try:
        walk()
    except (AssertionError, StreamError, msgspec.ValidationError, pytest.fail.Exception):
        return True
    return False


def test_the_real_library_passes_every_walk(mutant_stream: Stream) -> None:
    mutant_stream.load_library()
    for walk in _suite(mutant_stream):
        walk()


@pytest.mark.parametrize("rule", MUTANTS)
def test_a_broken_rule_is_noticed(mutant_stream: Stream, rule: str) -> None:
    original, broken = MUTANTS[rule]
    source = files("buffer").joinpath("functions.lua").read_text()
    assert source.count(original) == 1, f"{original!r} must stand once in functions.lua"
    mutant_stream.redis.function_load(source.replace(original, broken), replace=True)
    assert any(map(_fails, _suite(mutant_stream))), "no walk noticed"
