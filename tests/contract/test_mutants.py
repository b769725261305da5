"""The suite notices broken rules: each mutant of the function library must fail a script or a random walk.

A mutant is one replacement that matches exactly once, so a rule that is rewritten must be mutated
anew here. The unchanged library passes all of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from buffer.client import Stream, library_source
from buffer.errors import StreamError
from buffer.local_server import LocalServer
from tests.contract.scripts import SCRIPTS, random_walk, scripted_walk

SEEDS = range(10)
STEPS = 150

MUTANTS = {
    # Admission.
    "admission range stops before the head's newest deadline": (
        "for d = deadline, S.head + S.eta do\n    if out(C, d) + 1",
        "for d = deadline, S.head + S.eta - 1 do\n    if out(C, d) + 1",
    ),
    "admission counts one group too few": (
        "if out(C, d) + 1 > (d - S.head + 1) * S.cap then return 'full' end",
        "if out(C, d) > (d - S.head + 1) * S.cap then return 'full' end",
    ),
    "admission knows no end of the run": (
        "if out(C, math.huge) + 1 > (S.max_steps - S.head) * S.cap then return 'enough' end",
        "",
    ),
    "admission knows no limit of memory": ("if memory_full(C) then return 'memory' end", ""),
    "an actor with old weights gets a lease": (
        "if deadline < S.head then return 'old-weights' end",
        "deadline = math.max(deadline, S.head)",
    ),
    "the deadline ignores the actor's version": (
        "local deadline = math.min(actor.version, S.head) + S.eta",
        "local deadline = S.head + S.eta",
    ),
    "a repeated admission is a new one": ("if request == work.request then return work.reply end", ""),
    "an overtaken admission is granted": ("if request < work.request then", "if false then"),
    "a slow actor gets leases as any other": (
        "if deadline == S.head or S.clock - work.probe < PROBE_MS then return 'slow' end",
        "",
    ),
    "every actor is slow": (
        "return S.live > 1 and S.step_ms > 0 and",
        "return S.live > 0 and S.step_ms > 0 or",
    ),
    # Batches.
    "an unsafe batch is assigned": ("    if excess(C, taken, d) > 0 then return false end\n", ""),
    "the safety test stops at the head": (
        "local function horizon(S) return S.cap > S.batch and S.head or S.head + S.eta end",
        "local function horizon(S) return S.head end",
    ),
    "batches go by group id, not by deadline": (
        "write(C, 'ZADD', C.key.ready, lease.deadline, group)",
        "write(C, 'ZADD', C.key.ready, 0, group)",
    ),
    "drop abandons nothing": ("if not safe(C, taken) then abandon(C, taken) end", ""),
    "drop abandons one too many": ("if need <= 0 or one.lease", "if need < 0 or one.lease"),
    "wait abandons like drop": ("(S.policy == 'drop' or lease.probe or late[actor])", "true"),
    "a slow actor's leases are waited for": ("or lease.probe or late[actor])", "or lease.probe)"),
    "what was abandoned does not count": (
        "      remember(C, one.lease.actor, S.clock - one.lease.born)\n",
        "",
    ),
    "surplus stays": ("if S.cap > S.batch then drop_surplus(C, taken) end", ""),
    "no checkpoint is ever due": ("if S.uncovered_max > 0 and step", "if false and step"),
    "a short batch before the data ends": ("return C.S.data_end >= 0 and", "return"),
    "a struck group is trained": (
        "    if not manifest.strikes[row[1]] then\n      staleness",
        "    if true then\n      staleness",
    ),
    "a strike may come again": ("if manifest.strikes[group] then return", "if false then return"),
    "a trained group may be struck": (
        "if step < C.S.version then fail('TRAINED'",
        "if false then fail('TRAINED'",
    ),
    "one failure to decode drops a queued group": ("local STRIKES = 3", "local STRIKES = 1"),
    # Leases and prompts.
    "the clock follows the server's without a bound": (
        "math.max(0, math.min(1000, now - S.last))",
        "(now - S.last)",
    ),
    "a lease that ends does not return its prompt": (
        "    queue_again(C, to_tail and C.tail or C.back, row, attempt)\n    if payload",
        "    if payload",
    ),
    "a prompt that returns goes to the tail": (
        "queue_again(C, to_tail and C.tail or C.back, row, attempt)",
        "queue_again(C, C.tail, row, attempt)",
    ),
    "a prompt is never retired": ("  if attempt < row.limit then", "  if true then"),
    "a fork costs a prompt an attempt": ("(reason == 'lineage' and 0 or 1)", "1"),
    "a heartbeat renews nothing": ("write(C, 'ZADD', C.key.leases, expiry, args[i])", "local _ = expiry"),
    "a heartbeat renews for ever": ("expiry = math.min(expiry, lease.born + longest)", "expiry = expiry + 0"),
    "a heartbeat renews other actors' leases": (
        "if lease and lease.actor == name then\n      local",
        "if lease then\n      local",
    ),
    "an actor drops other actors' leases": (
        "local mine = lease and lease.actor == name",
        "local mine = lease",
    ),
    "an actor that leaves keeps its leases": ("held = tokens_of(work_of(C, name))", "held = {}"),
    # Publishing.
    "publish takes any digest": (
        "if not version or call('HGET', C.key.versions, version) ~= digest then return false end",
        "if not version then return false end",
    ),
    "publish believes the caller's version_min": (
        "return lowest == version_min",
        "return lowest < math.huge",
    ),
    "publish takes groups older than the lease": ("or version_min < lease.version then", "then"),
    "publish takes another group's id": ("if lease.group ~= group or not version_min", "if not version_min"),
    "a refused payload stays": ("if own and at ~= entry then write(C, 'XDEL', C.key.stream, entry) end", ""),
    "a repeated publish is late": ("if known and known.token == token then", "if false then"),
    "publish knows no epoch": (
        "if call('HGET', C.key.epochs, 'actor:' .. name) ~= args[2] then",
        "if false then",
    ),
    # Epochs, versions, recovery.
    "no epoch fences anybody": ("  if current ~= epoch then\n    fail", "  if false then\n    fail"),
    "applied takes any digest": ("if digest ~= args[4] then", "if not digest then"),
    "an engine's version goes back": ("if version <= actor.version then", "if version == actor.version then"),
    "payloads are never deleted": ("  else write(C, 'XDEL', C.key.stream, row.entry) end", "  end"),
    "a checkpoint covers its own step": (
        "set(C, 'wanted', math.max(C.S.wanted, oldest - 1))",
        "set(C, 'wanted', oldest)",
    ),
    "a twin's digest counts": (
        "if known then return cmsgpack.pack({ S.version, known }) end",
        "if known then return cmsgpack.pack({ S.version, digest }) end",
    ),
    "a fork keeps what is outstanding": ("  abandon_outstanding(C, 'lineage')\n", ""),
    "a fork keeps later steps": ("  undo_steps(C, at)\n", ""),
    "a fork lets actors keep undone weights": ("if actor.version > at then", "if false then"),
    "an older server keeps its head": ("  set(C, 'head', math.max(S.head, head))\n", ""),
    "an older server keeps what was assigned since": (
        "if not claim(C, known, row[1], position) then count(C, 'admitted', 1) end",
        "count(C, 'admitted', 1)",
    ),
    "an older server queues prompts of trained groups": (
        "if done[tonumber(row:match('^%d+'))] then write(C, 'LREM', C.key.prompts, 1, row) end",
        "",
    ),
    "an older server is fed trained prompts again": (
        "    if position >= C.S.tail then\n",
        "    if false then\n",
    ),
    "an older server keeps what is due no more": (
        "  if older or restarted then shed(C, open_groups) end\n",
        "",
    ),
    "an older server forgets versions": (
        "write(C, 'HSET', C.key.versions, at, known.versions[tostring(at)])",
        "local _ = known.versions[tostring(at)]",
    ),
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


class _AsItIs(Stream):
    """A learner that joins loads the library; here it stays the mutant."""

    def load_library(self) -> None:
        """Loads nothing."""


def _fresh(stream: Stream) -> Stream:
    return _AsItIs(stream.redis, f"walk-{secrets.token_hex(4)}", patience_s=1.0)


def _fails(walk: Callable[[], None]) -> bool:
    try:
        walk()
    except (AssertionError, StreamError, LookupError, ValueError, pytest.fail.Exception):
        return True
    return False


def test_the_real_library_passes_every_walk(mutant_stream: Stream) -> None:
    mutant_stream.load_library()
    for walk in _suite(mutant_stream):
        walk()


@pytest.mark.parametrize("rule", MUTANTS)
def test_a_broken_rule_is_noticed(mutant_stream: Stream, rule: str) -> None:
    original, broken = MUTANTS[rule]
    source = library_source()
    assert source.count(original) == 1, f"{original!r} must stand once in the library"
    mutant_stream.redis.function_load(source.replace(original, broken), replace=True)
    assert any(map(_fails, _suite(mutant_stream))), "no walk noticed"
