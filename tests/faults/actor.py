"""A scripted actor, a process of its own: `python -m tests.faults.actor SETTINGS_JSON`.

It serves the newest version of `{run}:versions`, also in mid-group. While Redis is away it asks for
nothing; when it is back it first hears which leases are gone, publishes what is still wanted and closes
the rest. Its points: `joined leased generating generated published`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from buffer.admission import Admit, Lease
from buffer.client import AsyncStream, Call
from buffer.codec import encode
from buffer.connect import LOST
from buffer.errors import Fenced, ForeignRun, NoRun, RedisFull, RedisUnavailable, StreamError
from buffer.ledger import Snapshot
from buffer.members import Applied, Heartbeat, JoinActor, Leave
from buffer.schema import SCHEMA_VERSION, Group, Version
from buffer.stream import Publish
from tests.faults.points import Faults, Log, to_the_end
from tests.faults.poison import KINDS, spoil
from tests.faults.policy import finished_sample, speak


class ActorSettings(msgspec.Struct, kw_only=True):
    """What the test tells it."""

    url: str
    run: str
    name: str
    log: str
    seed: int = 0
    group_size: int = 2
    lease_s: float = 1.0
    concurrency: int = 2
    group_s: float = 0.02
    """Seconds a group takes."""
    answer: int = 8
    """Tokens of an answer, generated in two parts; weights may change between them."""
    vocabulary: int = 1000
    """Token ids are below this."""
    by_number: bool = False
    """Whether answers depend on the version's number instead of its digest, so that learners whose weights
    differ in their last bits are told the same."""
    state: str = "running"
    """What its heartbeats say; to one that is `starting` no learner brings weights."""
    patience_s: float = 90.0
    schema: int = SCHEMA_VERSION
    poison: int = -1
    """Seed of the damage done to every payload; -1: none."""
    poison_kinds: tuple[str, ...] = tuple(KINDS)
    """Names of the kinds of damage to draw from."""
    clock_s: float = 0.0
    """How far this process's wall clock is off."""
    weights: bool = False
    """Whether it pulls its weights, as `tests.faults.weights` says, instead of looking them up."""
    weights_port: int = 0
    """The port by which alone it pulls; 0: that of whoever offers them."""


class Actor:
    """One life of the actor."""

    def __init__(self, settings: ActorSettings, log: Log, faults: Faults) -> None:
        self.settings, self.log, self.faults = settings, log, faults
        self.stream = self._connect()
        self.epoch, self.nonce, self.version, self.digest = "", "", -1, ""
        self.declared = False
        """Whether Redis knows which version is served."""
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.slots = asyncio.Semaphore(settings.concurrency)
        self.requests = 0
        self.online, self.beat_now, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.joining = asyncio.Lock()
        self.damage = random.Random(settings.poison)
        self.failed: BaseException | None = None
        """The error that a group met."""
        self._said = ""

    def _connect(self) -> AsyncStream:
        """A connection, also if Redis is away just now."""
        settings, deadline = self.settings, time.monotonic() + self.settings.patience_s
        while True:
            try:
                return AsyncStream.connect(settings.url, settings.run, patience_s=settings.patience_s)
            except RedisUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    async def live(self) -> str:
        """From joining to the end of the run or a SIGTERM; why it ended."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.ended.set)
        await self._join("")
        self.faults.at("joined")
        loops = [asyncio.create_task(loop()) for loop in (self._beat, self._watch, self._apply, self._lease)]
        loops.append(asyncio.create_task(self.ended.wait()))
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            loops[3].cancel()
            if self.tasks:
                await asyncio.wait(list(self.tasks.values()), timeout=10)
            left = await self._call(lambda: Leave("actor", self.settings.name, self.epoch))
        finally:
            everything = [*loops, *self.tasks.values()]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
            await self.stream.close()
        return f"the run is over, {left.released} leases handed back"

    async def to_the_end(self) -> str:
        """The same, errors of its groups included."""
        reason = await self.live()
        if self.failed is not None:
            raise self.failed
        return reason

    async def _join(self, old: str) -> None:
        """Joins, unless another task did so since `old` was the epoch."""
        async with self.joining:
            deadline = time.monotonic() + self.settings.patience_s
            while self.epoch == old:
                call = JoinActor(secrets.token_hex(16), self.settings.name, "host", self.settings.schema)
                try:
                    joined = await self.stream.call(call)
                except NoRun:  # at first the learner may be to come; later the run is gone
                    if old or time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(0.1)
                    continue
                if self.nonce not in ("", joined.nonce):
                    raise self._foreign(joined.nonce)
                self.epoch, self.nonce, self.declared = joined.epoch, joined.nonce, False
                self.log("joined", epoch=self.epoch)

    async def _check_nonce(self) -> None:
        """Raises `ForeignRun` if the server holds another run of this name."""
        nonce = (await self.stream.call(Snapshot())).state["nonce"]
        if nonce != self.nonce:
            raise self._foreign(nonce)

    def _foreign(self, nonce: str) -> ForeignRun:
        return ForeignRun(
            f"run {self.settings.run}: this actor belongs to the run with nonce {self.nonce}, the server "
            f"holds {nonce}; it was swapped"
        )

    async def _call(self, make: Callable[[], Call[Any]]) -> Any:
        """A call under the epoch of now; again after a full server, or one that came back older."""
        while True:
            epoch = self.epoch
            try:
                return await self.stream.call(make())
            except RedisFull as error:
                await self._back_off(error)
            except Fenced as error:
                if self.epoch != epoch:
                    continue  # this actor has joined again while the call was on its way
                await self._check_nonce()
                if not error.came_back_older:
                    raise
                self.log("fenced", reason=str(error))
                self._close(list(self.tasks), "the server came back older")
                await self._join(epoch)
            except NoRun as error:
                raise ForeignRun(f"run {self.settings.run} is gone from its server: {error}") from error

    async def _back_off(self, error: RedisFull) -> None:
        self._say("full", reason=str(error))
        await asyncio.sleep(0.3)

    def _say(self, event: str, **fields: Any) -> None:
        """Logs what is not said already."""
        if event != self._said:
            self.log(event, **fields)
        self._said = event

    def _close(self, tokens: list[str], reason: str) -> None:
        for token in tokens:
            if task := self.tasks.get(token):
                task.cancel()
                self.log("closed", token=token, reason=reason)

    async def _watch(self) -> None:
        """A reply that was lost: nothing is asked or published before a heartbeat got through."""
        seen = self.stream.lost
        while True:
            if self.stream.lost != seen:
                seen = self.stream.lost
                self.online.clear()
                self.beat_now.set()
                self._say("away")
            await asyncio.sleep(0.02)

    async def _beat(self) -> None:
        while True:
            self.beat_now.clear()
            lost = self.stream.lost
            beat = await self._call(
                lambda: Heartbeat(
                    self.settings.name, self.epoch, self.settings.state, self._stats(), tuple(self.tasks)
                )
            )
            self._close(beat.lost, "no longer wanted")
            if beat.ended:
                self.ended.set()
            if self.stream.lost == lost and not self.online.is_set():
                self.online.set()
                self._say("online")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.beat_now.wait(), self.settings.lease_s / 3)

    def _stats(self) -> str:
        """What heartbeats say besides; JSON."""
        return "{}"

    async def _apply(self) -> None:
        """Serves the newest committed version."""
        versions, step = self.stream.key("versions"), self.stream.key("step")
        own = asyncio.current_task()
        assert own is not None
        while not own.cancelling():  # which redis-py may have swallowed
            try:
                newest = int(await self.stream.redis.get(step) or -1)
                # An older one only if Redis no longer counts what is served: after a fork.
                due = newest > self.version or not self.declared
                of = await self.stream.redis.hget(versions, str(newest)) if due else None
            except LOST:
                self.stream.lost += 1
                of = None
            if of is not None:
                await self._serve(newest, of.decode())
            await asyncio.sleep(0.03)

    async def _serve(self, version: int, of: str) -> None:
        self.version, self.digest = version, of  # first the engine, then the word
        try:
            serving = await self._call(lambda: Applied(self.settings.name, self.epoch, version, of))
        except StreamError as error:
            if type(error) is not StreamError:
                raise
            self.log("not applied", reason=str(error))  # the server came back older in between: look again
        else:
            self.version, self.digest, self.declared = serving.version, serving.digest, True

    async def _lease(self) -> None:
        """Keeps `concurrency` groups in flight."""
        while True:
            await self.slots.acquire()
            await self.online.wait()
            if not self.declared:
                await asyncio.sleep(0.02)
                self.slots.release()
                continue
            self.requests += 1
            number, word = self.requests, secrets.token_hex(16)
            lease = await self._call(lambda: Admit(self.settings.name, self.epoch, number, word))  # noqa: B023
            if lease.status == "lease":
                self._say("leased")
                self.tasks[lease.token] = asyncio.create_task(self._work(lease))
                self.tasks[lease.token].add_done_callback(self._ended)
                self.faults.at("leased")
            else:
                self._say(f"waiting: {lease.reason}")
                if lease.reason in ("old-weights", "no-weights"):
                    self._behind()
                self.slots.release()
                await self.stream.take(self.stream.key("places"), 0.3)

    def _behind(self) -> None:
        """Admission wants a newer version, or a server that came back older has forgotten this one."""
        self.declared = False

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Ends the actor with the error that a group met."""
        if not task.cancelled() and (error := task.exception()):
            self.failed = error
            self.ended.set()

    async def _work(self, lease: Lease) -> None:
        try:
            group = await self._generate(lease)
            self.faults.at("generated")
            await self._publish(lease, group)
            self.faults.at("published")
        finally:
            del self.tasks[lease.token]
            self.slots.release()

    async def _generate(self, lease: Lease) -> Group:
        """The group of a lease, in two parts, each by the version served when it begins."""
        assert lease.prompt is not None
        started, settings, table = time.time(), self.settings, list[Version]()
        parts: list[list[Any]] = [[] for _ in range(settings.group_size)]
        half = settings.answer // 2
        for begin, length in ((0, half), (half, settings.answer - half)):
            serving = Version(self.version, self.digest)
            if serving not in table:
                table.append(serving)
            await asyncio.sleep(settings.group_s / 2)
            for index, part in enumerate(parts):
                of = str(serving.number) if settings.by_number else serving.digest
                tokens, logprobs = speak(of, settings.seed, lease.position, index, begin, length)
                part.append((table.index(serving), tokens % settings.vocabulary, logprobs))
            self.faults.at("generating")
        samples = [finished_sample(lease.prompt, part) for part in parts]
        epoch = int(self.epoch.partition(":")[0])
        lineage = int(lease.group.partition("-")[0])
        return Group(
            lineage, lease.position, lease.attempt, lease.prompt.row, settings.name, epoch, 1.0, table,
            started, time.time(), samples,
        )  # fmt: skip

    async def _publish(self, lease: Lease, group: Group) -> None:
        payload = encode(group)
        call = Publish.of(group, epoch=self.epoch, token=lease.token, size=len(payload))
        if self.settings.poison >= 0:
            payload = spoil(group, payload, self.damage, self.settings.poison_kinds)
        while True:
            await self.online.wait()
            begun = time.monotonic()
            try:
                answer = await self.stream.publish(call, payload)
                break
            except RedisFull as error:
                await self._back_off(error)
        self._said = ""
        self.log("published", group=group.id, status=answer.status, reason=answer.reason, begun=begun)


def main() -> int:
    """Entry point of the process."""
    settings = msgspec.json.decode(sys.argv[1], type=ActorSettings)
    now = time.time
    time.time = lambda: now() + settings.clock_s
    log = Log(settings.log)
    kind = Actor
    if settings.weights:
        from tests.faults.weights import PullingActor as kind
    return to_the_end(log, lambda: asyncio.run(kind(settings, log, Faults(settings.name)).to_the_end()))


if __name__ == "__main__":
    sys.exit(main())
