"""A whole small run in which every role does all it ever does, each under its own user.

whole_run(urls, "demo", admin)      # raises `RightMissing` where a user lacks a right
"""

from __future__ import annotations

from contextlib import ExitStack, closing

import redis

from buffer.admission import Drop
from buffer.batches import Assignment, Manifest
from buffer.client import Stream
from buffer.keys import RUNS, routed_key
from buffer.ledger import Ledger, Snapshot, violations
from buffer.members import Joined, JoinRecorder, LearnerBeat, Leave, RecorderBeat
from buffer.prompts import Requeue
from buffer.recovery import Known, Reconcile
from buffer.stream import read_frames, sweep
from tests.contract.harness import Run


class Roles:
    """The connections of all roles to one run. `learner` and `actor` know each other's epochs."""

    def __init__(
        self, urls: dict[str, str], name: str, admin: redis.Redis, stack: ExitStack, shards: int
    ) -> None:
        streams = {
            role: stack.enter_context(closing(Stream.connect(url, name, patience_s=2.0, shards=shards)))
            for role, url in urls.items()
        }
        self.learner = Run(streams["learner"], attempts_max=1, shards=shards)
        self.actor = Run(streams["actor"])
        self.actor.epochs = self.learner.epochs
        self.viewer, self.operator, self.admin = streams["viewer"], streams["operator"], admin


def whole_run(urls: dict[str, str], name: str, admin: redis.Redis, *, shards: int = 0) -> Ledger:
    """Drives the run; the viewer's last look at it."""
    with ExitStack() as stack:
        roles = Roles(urls, name, admin, stack, shards)
        _begin(roles)
        _generate(roles)
        _train(roles)
        _look(roles.viewer, name)
        _operate(roles)
        _come_back_older(roles)
        _end(roles)
        return roles.viewer.call(Snapshot(full=True))


def _begin(roles: Roles) -> None:
    learner, actor = roles.learner, roles.actor
    plain = learner.stream.redis
    learner.stream.load_library()
    learner.start()
    plain.info("server")
    plain.sadd(RUNS, learner.stream.run)
    plain.hset(learner.stream.key("files"), "config.json", "{}")
    plain.set(learner.stream.key("config"), "{}")
    plain.set(learner.stream.key("environment"), "{}")
    learner.stream.call(LearnerBeat(learner.epochs["learner"]))
    plain.hset(learner.stream.key("progress"), "loss", 1)
    assert plain.hget(learner.stream.key("versions"), "0")
    plain.hset(learner.stream.key("evaluations"), "version", 0)  # the evaluator that it starts
    plain.delete(learner.stream.key("mail:a"))
    plain.rpush(learner.stream.key("mail:a"), "request")
    plain.expire(learner.stream.key("mail:a"), 60)
    assert int(plain.llen(learner.stream.key("prompts"))) == 20  # type: ignore[arg-type]
    assert learner.stream.run.encode() in actor.stream.redis.smembers(RUNS)
    assert actor.stream.redis.hget(actor.stream.key("state"), "ended") == b""
    assert actor.stream.redis.incrby(actor.stream.key("actor_numbers"), 1) == 1
    assert actor.stream.redis.get(actor.stream.key("config")) == b"{}"
    assert actor.stream.redis.hgetall(actor.stream.key("files")) == {b"config.json": b"{}"}
    actor.join_actor("a")
    assert actor.stream.take(actor.stream.key("mail:a"), 1.0) == b"request"
    actor.applied("a", 0)
    actor.stream.redis.rpush(actor.stream.key("scores:a"), "scores")
    actor.stream.redis.expire(actor.stream.key("scores:a"), 60)
    actor.stream.redis.hset(actor.stream.key("fleet"), "here/1", "{}")
    actor.stream.redis.hset(actor.stream.key("routing"), "gone", 1)
    actor.stream.redis.hset(routed_key(actor.stream.run, "gone", actor.stream.shards), "0", "experts")
    actor.stream.redis.hincrbyfloat(actor.stream.key("difficulty"), "0:reward", 1.0)
    assert plain.hgetall(learner.stream.key("difficulty")) == {b"0:reward": b"1"}
    plain.hset(learner.stream.key("curriculum"), "0", "[]")
    assert learner.stream.take(learner.stream.key("scores:a"), 1.0) == b"scores"


def _generate(roles: Roles) -> None:
    actor, state = roles.actor, roles.actor.stream.key("state")
    actor.queue("a", 2)
    lease, other = actor.leases("a", 2)
    assert actor.stream.take(actor.stream.key("places"), 1.0) == b"1"
    assert actor.heartbeat("a", lease.token, other.token).lost == []
    roles.admin.hset(state, "dead_bytes", 1 << 26)  # dead letters are full: the next one looks for the oldest
    actor.stream.call(Drop("a", actor.epochs["a"], lease.token, "engine"))
    assert actor.publish(lease, "a").status == "late"
    assert actor.publish(other, "a", 99).status == "refused"
    for _ in range(2):  # the clock advances by at most a second a call, so both leases expire in the second
        expiring = actor.admit("a")
        roles.admin.hincrby(state, "clock", 70_000)
        assert actor.heartbeat("a", expiring.token).lost == [expiring.token]
    roles.admin.hset(state, "dead_bytes", 0)
    actor.stream.call(Snapshot())


def _train(roles: Roles) -> None:
    learner, actor = roles.learner, roles.actor
    assert learner.stream.take(learner.stream.key("bell"), 1.0) == b"1"
    rows = learner.assign(0).manifest.groups()
    assert [frame.problem for frame in read_frames(learner.stream, rows)] == [None, None]
    learner.strike(0, rows[0].group)
    learner.commit(1, covered=0)
    learner.checkpoint(1)
    queued = actor.queue("a", 2)
    for _ in range(3):
        learner.strike(-1, queued[0].group)
    experts = routed_key(learner.stream.run, "gone", learner.stream.shards)
    assert learner.stream.redis.hget(experts, "0") == b"experts"
    assert sweep(learner.stream) == (3 if learner.stream.shards else 0)
    assert not learner.stream.redis.exists(experts)
    actor.admit("a")
    learner.fork(0, 0)


def _look(viewer: Stream, name: str) -> None:
    plain = viewer.redis
    ledger = viewer.call(Snapshot(full=True))
    assert violations(ledger) == []
    assert name.encode() in plain.smembers(RUNS)
    assert plain.get(viewer.key("step")) == b"0"
    assert plain.hget(viewer.key("state"), "lineage") == b"1"
    assert plain.hgetall(viewer.key("progress")) == {b"loss": b"1"}
    assert plain.hgetall(viewer.key("evaluations")) == {b"version": b"0"}
    assert len(plain.xrange(viewer.key("dead"))) == len(plain.xrevrange(viewer.key("dead"))) > 0  # type: ignore[arg-type]
    assert len(plain.lrange(viewer.key("forks"), 0, -1)) == 1  # type: ignore[arg-type]
    assert viewer.redis.execute_command("FCALL_RO", "slipstream2_aged", 1, viewer.key("stream"), 0) == []


def _operate(roles: Roles) -> None:
    operator = roles.operator
    plain = operator.redis
    assert operator.run.encode() in plain.smembers(RUNS)
    assert plain.hget(operator.key("state"), "ended") == b""
    assert plain.get(operator.key("config")) == b"{}"
    assert plain.hgetall(operator.key("fleet")) == {b"here/1": b"{}"}
    plain.hset(operator.key("fleet"), "here/1:wanted", 3)
    assert plain.hget(operator.key("versions"), "0")
    plain.hset(operator.key("evaluations"), "version", 1)
    letters = plain.xrange(operator.key("dead"))
    entry = next(identity for identity, fields in letters if fields[b"prompt"])  # type: ignore[union-attr]
    assert operator.call(Requeue(entry.decode())).position >= 0
    joined: Joined = operator.call(JoinRecorder("bits", "r"))
    assert plain.hget(routed_key(operator.run, "gone", operator.shards), "0") is None
    actor = roles.actor
    actor.applied("a", 0)
    actor.queue("a", 2)
    step = operator.call(Snapshot()).number("head")
    rows = roles.learner.assign(step).manifest.groups()
    assert [frame.problem for frame in read_frames(operator, rows)] == [None, None]
    roles.learner.commit(step + 1, covered=step)
    expiring = actor.admit("a")
    roles.admin.hincrby(operator.key("state"), "clock", 70_000)
    roles.admin.hset(operator.key("state"), "dead_bytes", 1 << 26)
    assert operator.call(RecorderBeat("r", joined.epoch, step)).covered == step
    roles.admin.hset(operator.key("state"), "dead_bytes", 0)
    assert actor.heartbeat("a", expiring.token).lost == [expiring.token]
    operator.call(Leave("recorder", "r", joined.epoch))


def _come_back_older(roles: Roles) -> None:
    """The learner knows two steps more than the server: of a prompt still queued, and of one not yet fed."""
    learner = roles.learner
    ledger = learner.snapshot()
    head, tail, lineage = ledger.number("head"), ledger.number("tail"), ledger.number("lineage")
    held = int(learner.stream.redis.lrange(learner.stream.key("prompts"), -1, -1)[0].split()[0])  # type: ignore[index]
    known = Known("nonce", lineage, head + 1, tail + 1, ledger.number("version"), 0, -1)
    groups = [f"{lineage:04d}-{position:010d}-00" for position in (held, tail)]
    known.manifests = {head: Manifest([Assignment(group, "1-1", head, 9) for group in groups])}
    learner.stream.call(Reconcile(learner.epochs["learner"], True, known))
    learner.feed(tail, 2)
    learner.strike(head, groups[0], "lost")
    learner.commit(head + 1)


def _end(roles: Roles) -> None:
    learner, actor = roles.learner, roles.actor
    actor.admit("a")
    actor.leave("a")
    roles.operator.redis.set(roles.operator.key("stop"), "asked")
    assert roles.operator.call(Snapshot()).sizes["stopping"] == 1
    assert learner.stream.redis.exists(learner.stream.key("stop"))
    learner.stream.call(Leave("learner", "stopped", learner.epochs["learner"]))
    assert learner.snapshot().counts.leased == 0
