"""Small builders for contract tests: groups that fit a lease, and a run with a learner and actors.

run = Run(stream, batch=2, eta=1)
run.start("a")              # learner and actor joined, version 0 committed and applied, prompts fed
lease = run.admit("a")
run.publish(lease, "a")     # -> Published(status="ok", ...)
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

from buffer.admission import Admit, Lease
from buffer.batches import Assign, Assigned, Strike, Struck
from buffer.client import Stream
from buffer.codec import encode
from buffer.ledger import Ledger, Snapshot
from buffer.members import Applied, Beat, Heartbeat, JoinActor, JoinLearner, Leave, Rules
from buffer.prompts import Fed, Feed, encode_prompt
from buffer.schema import Group, Prompt, Sample, Span, Version
from buffer.stream import Publish, Published
from buffer.versions import Commit, CommitCheckpoint, Fork, Forked

SETTINGS = {"batch": 2, "eta": 1, "max_steps": 100, "group_size": 2, "lease_ms": 60_000, "attempts_max": 3}
"""The settings of a run unless a test says otherwise."""


def digest(version: int) -> str:
    """The digest that tests commit for a version."""
    return f"digest-{version}"


def make_group(
    position: int = 0,
    attempt: int = 0,
    *,
    lineage: int = 0,
    versions: tuple[int, ...] = (0,),
    actor: str = "a",
    size: int = 2,
    answer: int = 4,
) -> Group:
    """A valid group: `size` samples of `answer` tokens, as many spans as versions."""
    lengths = [answer - len(versions) + 1, *[1] * (len(versions) - 1)]
    samples = [
        Sample(
            tokens=np.arange(position, position + 3 + answer, dtype=np.int32),
            prompt_length=3,
            logprobs=np.full(answer, -0.5 - index, np.float32),
            loss_runs=[answer],
            spans=[Span(length, place) for place, length in enumerate(lengths)],
            reward=float(index % 2),
            rewards={"correct": float(index % 2)},
            finish_reason="stop",
        )
        for index in range(size)
    ]
    table = [Version(number, digest(number)) for number in versions]
    return Group(lineage, position, attempt, position, actor, 1, 1.0, table, 1.0, 2.0, samples)


def encoded_prompts(position: int, count: int) -> tuple[bytes, ...]:
    """Records of the prompts from a position on; prompt p has the one token p."""
    return tuple(encode_prompt(Prompt(p, [p], f"answer {p}")) for p in range(position, position + count))


class Run:
    """A run on a real server with its epochs. Each method is one call, unless it says otherwise."""

    def __init__(self, stream: Stream, **settings: Any) -> None:
        self.stream = stream
        chosen = {**SETTINGS, **settings}
        self.rules = Rules(**{"cap": chosen["batch"], **chosen})
        self.epochs: dict[str, str] = {}
        """Epoch of each role: `learner`, or the name of an actor."""
        self.requests: dict[str, int] = {}

    def start(self, *actors: str, prompts: int = 20) -> Run:
        """Joins everybody, commits version 0, applies it to every actor and feeds prompts."""
        self.join_learner()
        self.commit(0)
        for actor in actors:
            self.join_actor(actor)
            self.applied(actor, 0)
        if prompts:
            self.feed(0, prompts)
        return self

    def join_learner(self, random: str = "") -> str:
        """Joins as a new learner; the epoch."""
        call = JoinLearner(random=random or secrets.token_hex(16), nonce="nonce", rules=self.rules)
        self.epochs["learner"] = self.stream.call(call).epoch
        return self.epochs["learner"]

    def join_actor(self, actor: str, random: str = "") -> str:
        """Joins as the actor; the epoch."""
        call = JoinActor(random=random or secrets.token_hex(16), name=actor, host="host")
        self.epochs[actor] = self.stream.call(call).epoch
        return self.epochs[actor]

    def feed(self, position: int, count: int, *, final: bool = False) -> Fed:
        """Feeds `count` prompts at a position; prompt p has the one token p."""
        prompts = encoded_prompts(position, count)
        return self.stream.call(Feed(self.epochs["learner"], position, prompts, final))

    def next_admit(self, actor: str) -> Admit:
        """The actor's next admit call, not yet made."""
        self.requests[actor] = self.requests.get(actor, 0) + 1
        return Admit(actor, self.epochs[actor], self.requests[actor], secrets.token_hex(8))

    def admit(self, actor: str) -> Lease:
        """Asks for a lease with a new request number."""
        return self.stream.call(self.next_admit(actor))

    def leases(self, actor: str, count: int) -> list[Lease]:
        """`count` admissions, all of which must be granted."""
        granted = [self.admit(actor) for _ in range(count)]
        assert [lease.status for lease in granted] == ["lease"] * count, granted
        return granted

    def publish_call(self, lease: Lease, actor: str, *versions: int) -> tuple[Publish, bytes]:
        """The call and payload that hand in a valid group for a lease; its own version by default."""
        table = versions or (lease.version,)
        lineage = int(lease.group.partition("-")[0])
        group = make_group(lease.position, lease.attempt, lineage=lineage, versions=table, actor=actor)
        payload = encode(group)
        call = Publish.of(group, epoch=self.epochs[actor], token=lease.token, size=len(payload))
        return call, payload

    def publish(self, lease: Lease, actor: str, *versions: int) -> Published:
        """Hands in a valid group for a lease."""
        return self.stream.publish(*self.publish_call(lease, actor, *versions))

    def queue(self, actor: str, count: int) -> list[Lease]:
        """Admits and publishes `count` groups, all of which must succeed."""
        granted = self.leases(actor, count)
        assert [self.publish(lease, actor).status for lease in granted] == ["ok"] * count
        return granted

    def heartbeat(self, actor: str, *tokens: str, stats: str = "{}") -> Beat:
        """Beats as a running actor."""
        return self.stream.call(Heartbeat(actor, self.epochs[actor], "running", stats, tokens))

    def assign(self, step: int) -> Assigned:
        """The batch of a step."""
        return self.stream.call(Assign(self.epochs["learner"], step))

    def commit(self, version: int, covered: int = -1) -> int:
        """Commits a version with its usual digest."""
        call = Commit(self.epochs["learner"], version, digest(version), covered)
        return self.stream.call(call).version

    def checkpoint(self, version: int, oldest: int | None = None) -> int:
        """Commits a checkpoint of a version, the only one kept unless `oldest` says otherwise."""
        kept = version if oldest is None else oldest
        call = CommitCheckpoint(self.epochs["learner"], version, digest(version), kept)
        return self.stream.call(call).version

    def strike(self, step: int, group: str, reason: str = "poison", payload: bytes = b"bad") -> Struck:
        """Strikes a group of a step, or with step -1 a queued one."""
        return self.stream.call(Strike(self.epochs["learner"], step, group, reason, payload))

    def fork(self, lineage: int, at: int, rules: Rules | None = None) -> Forked:
        """Leaves a lineage at a version."""
        return self.stream.call(Fork(self.epochs["learner"], lineage, at, "test", rules or self.rules))

    def applied(self, actor: str, version: int) -> int:
        """Says that the actor serves a version, with its usual digest."""
        return self.stream.call(Applied(actor, self.epochs[actor], version, digest(version))).version

    def leave(self, actor: str) -> int:
        """The actor leaves; how many leases it handed back."""
        return self.stream.call(Leave("actor", actor, self.epochs[actor])).released

    def leave_learner(self, reason: str) -> int:
        """The learner ends the run; how many leases were released."""
        return self.stream.call(Leave("learner", reason, self.epochs["learner"])).released

    def snapshot(self) -> Ledger:
        """The control state."""
        return self.stream.call(Snapshot(full=True))

    def keys(self) -> dict[str, Any]:
        """Everything Redis holds of the run but the clock, to prove that a call changed nothing."""
        redis, found = self.stream.redis, {}
        for name in redis.scan_iter(match=f"{{{self.stream.run}}}:*", count=1000):
            kind = redis.type(name)
            if kind == b"hash":
                found[name] = redis.hgetall(name)
            elif kind == b"zset":
                found[name] = redis.zrange(name, 0, -1, withscores=True)
            elif kind == b"list":
                found[name] = redis.lrange(name, 0, -1)
            elif kind == b"stream":
                found[name] = redis.xrange(name)
            else:
                found[name] = redis.get(name)
        for moving in (b"clock", b"last"):
            found.get(self.stream.key("state").encode(), {}).pop(moving, None)
        return found

    def dump(self) -> dict[bytes, bytes]:
        """What a server would write of the run to its file."""
        redis = self.stream.redis
        return {name: redis.dump(name) for name in redis.scan_iter(f"{{{self.stream.run}}}:*", count=1000)}  # type: ignore[misc]

    def come_back(self, file: dict[bytes, bytes]) -> None:
        """The server as of a file, nothing at all for an empty one."""
        for name in self.dump():
            self.stream.redis.delete(name)
        for name, value in file.items():
            self.stream.redis.restore(name, 0, value)

    def elapse(self, milliseconds: int) -> None:
        """Lets time pass on the run's clock; the next call expires what is due."""
        self.stream.redis.hincrby(self.stream.key("state"), "clock", milliseconds)

    def stop_clock(self) -> None:
        """Puts the run's last reading of the time ahead of the server's: the next call advances by 0."""
        self.stream.redis.hset(self.stream.key("state"), "last", 1 << 50)
