"""An error at any command inside any function leaves the ledger exact, and the call can be made again.

The library is loaded with a counter before every command it gives to Redis; the test lets the n-th one
fail, for every n that a call reaches. A failed read changes nothing. A failed write is left to the
journal with all that follow it, and the next call of anybody finishes them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest

from buffer.batches import Assignment, Manifest
from buffer.client import Stream, library_source
from buffer.errors import StreamError
from buffer.ledger import Snapshot, violations
from buffer.local_server import LocalServer
from buffer.members import JoinRecorder, RecorderBeat
from buffer.prompts import Requeue
from buffer.recovery import Known, Reconcile
from tests.contract.harness import Run, digest

_CALL = "local function call(...) return redis.call(...) end"
_FAILING = """
local commands, failing = 0, 0
local function fails()
  commands = commands + 1
  return commands == failing
end
local function call(...)
  if fails() then error({ err = 'INJECTED' }) end
  return redis.call(...)
end
local function try(...)
  if fails() then return { err = 'INJECTED' } end
  return redis.pcall(...)
end
"""
_ARM = """
redis.register_function('arm', function(_, args)
  local before = commands
  commands, failing = 0, tonumber(args[1])
  return before
end)
"""


class Armed(Stream):
    """A stream whose library can be told at which command to fail."""

    def load_library(self) -> None:
        """The library with the counter."""
        source = library_source().replace(_CALL, _FAILING).replace("redis.pcall(unpack", "try(unpack")
        assert source.count("fails()") == 3
        self.redis.function_load(source + _ARM, replace=True)

    def arm(self, number: int) -> int:
        """Lets the n-th command from now on fail (0: none); how many there were since the last time."""
        return int(self.redis.fcall("arm", 0, number))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Armed]:
    """A server of its own: its library is not the real one."""
    with LocalServer.start(tmp_path_factory.mktemp("armed"), appendfsync="everysec") as server:
        stream = Armed.connect(server.socket_url, "armed")
        stream.load_library()
        yield stream
        stream.close()


def _filled(stream: Stream) -> Run:
    """A run with something in every place: leases, a queue, assigned and trained steps, a dead letter."""
    run = Run(stream, batch=2, eta=2, attempts_max=1, dynamic=1).start("a", "b")
    for step in range(2):
        run.queue("a", 2)
        run.assign(step)
    run.commit(1)
    run.queue("a", 1)
    run.leases("b", 1)
    run.applied("a", 1)
    stream.redis.xadd(
        run.stream.key("dead"),
        {"group": "g", "position": 19, "attempt": 0, "reason": "poison", "prompt": b"p", "payload": b""},
    )
    return run


def _older(run: Run) -> None:
    """What a learner knows that is two steps ahead."""
    ledger = run.snapshot()
    groups = [*ledger.ready, *(lease.group for lease in ledger.leased)]
    since = Manifest(
        [Assignment(group, f"1-{n}", 0, 7) for n, group in enumerate(groups)], {groups[0]: "lost"}
    )
    known = Known("nonce", 0, 3, 20, 2, 0, -1, {**ledger.manifests, 2: since}, {2: digest(2)})
    run.stream.call(Reconcile(run.epochs["learner"], True, known))


def _publish(run: Run) -> None:
    lease = run.admit("a")
    run.publish(lease, "a")


CALLS: dict[str, Callable[[Run], object]] = {
    "join learner": lambda run: run.join_learner("again"),
    "join actor": lambda run: run.join_actor("b", "again"),
    "join recorder": lambda run: run.stream.call(JoinRecorder("bits", "backup")),
    "feed": lambda run: run.feed(20, 2, final=True),
    "requeue": lambda run: run.stream.call(
        Requeue(run.stream.redis.xrange(run.stream.key("dead"))[0][0].decode())
    ),
    "admit": lambda run: run.admit("a"),
    "admit and publish": _publish,
    "assign": lambda run: run.assign(2),
    "strike": lambda run: run.strike(1, "0000-0000000002-00"),
    "commit": lambda run: run.commit(2, covered=0),
    "checkpoint": lambda run: run.checkpoint(1),
    "fork": lambda run: run.fork(0, 0),
    "reconcile": _older,
    "leave actor": lambda run: run.leave("b"),
    "heartbeat": lambda run: run.heartbeat("a"),
    "recorder": lambda run: run.stream.call(
        RecorderBeat("backup", run.stream.call(JoinRecorder("bits", "backup")).epoch, 0)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_error_at_any_command_leaves_the_ledger_exact(armed: Armed, name: str) -> None:
    call = CALLS[name]
    whole = _fresh(armed)
    armed.arm(0)
    call(whole)
    commands = armed.arm(0)
    assert commands > 5, "the counter counts"
    expected = whole.snapshot()
    broken = 0
    for number in range(1, commands + 1):
        run = _fresh(armed)
        armed.arm(number)
        broken += _breaks(call, run)
        armed.arm(0)
        assert run.stream.call(Snapshot()).counts.conserved, f"command {number}, at once"
        run.requests = dict.fromkeys(run.requests, 20 + number)
        run.join_actor("c")  # any call finishes what was left
        ledger = run.snapshot()
        assert violations(ledger) == [], f"command {number}"
        if ledger.counts != expected.counts:
            call(run)
            assert violations(run.snapshot()) == [], f"command {number}, again"
    assert broken >= commands - 2


def _breaks(call: Callable[[Run], object], run: Run) -> bool:
    try:
        call(run)
    except StreamError as error:
        return "INJECTED" in str(error)
    return False


def _fresh(stream: Armed) -> Run:
    return _filled(Armed(stream.redis, f"run-{secrets.token_hex(4)}"))
