"""An actor: one engine kept busy with leases.

It needs nothing but the URL: configuration, model config and tokenizer come through Redis. The engine
starts with dummy weights and gets no lease before it has been given a committed version. SIGTERM
drains: groups that have begun are finished, other leases handed back. If the engine fails, its process
group is killed, and the actor joins again with a new one under a new epoch. While Redis does not answer
it asks for nothing new and keeps what is in flight; if Redis comes back older, it joins again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from actors.concurrency import Place, Slots, adapt
from actors.engine import Engine
from actors.environments.base import load_environment
from actors.environments.text import Tokens
from actors.errors import ActorError, Cause, EngineError, RewardError
from actors.fetch import Settings, fetch_run
from actors.gate import Gate
from actors.publish import BACK_OFF_S, publish, teaches_nothing
from actors.rewards.pool import RewardPool
from actors.rollout import Recipe, rollout
from actors.utilisation import Utilisation
from actors.weights import WeightWorker
from buffer.admission import Admit, Drop, Lease
from buffer.client import AsyncStream
from buffer.difficulty import note
from buffer.errors import Fenced, ForeignRun, NoRun, RedisFull, StreamError
from buffer.members import Heartbeat, JoinActor, Leave
from buffer.schema import Group
from weightsync.errors import WeightSyncError
from weightsync.holder import Holder
from weightsync.route import address_towards

log = logging.getLogger("actor")

_WAIT_S = 1
_PATIENCE_S = 600.0
"""How long a Redis that does not answer is waited for."""
_DRAIN_S = 20.0
_RESTARTS = 5


class Actor:
    """One engine's life: from joining until the run ends, a stop, or the engine's failure."""

    def __init__(self, stream: AsyncStream, name: str, settings: Settings, model: Path, logs: Path) -> None:
        self._stream, self._name, self._settings = stream, name, settings
        self._model, self._logs = model, logs
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ahead: set[str] = set()
        """Tokens whose groups have not begun."""
        self._publishing: set[str] = set()
        """Tokens whose groups are being handed in: the answer to that says what became of the lease."""
        self._slots = Slots(settings.rollout.concurrency)
        self._use = Utilisation()
        self._gate: Gate | None = None
        self._environment = load_environment(settings.rollout.environment)
        self._rewards = RewardPool(settings.rollout.reward, settings.rollout.limits)
        self._invalid: collections.Counter[Cause] = collections.Counter()
        self._state, self._version, self._requests = "starting", -1, 0
        self._published = self._tokens = 0
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed, self._newer = asyncio.Event(), asyncio.Event()
        self._weights: WeightWorker | None = None
        self.epoch = self.nonce = ""
        self.served = False
        """Whether the engine ever came up; one that never did will not the next time either."""

    async def serve(self, stop: asyncio.Event) -> None:
        """Serves until the run ends or `stop` is set. Raises `EngineError`, `StreamError`."""
        joined = await self._stream.call(JoinActor(secrets.token_hex(16), self._name, socket.gethostname()))
        self.epoch, self.nonce = joined.epoch, joined.nonce
        heartbeat = asyncio.create_task(self._beat(stop))
        try:
            await self._with_engine(stop, heartbeat)
        finally:
            await _cancel(heartbeat)

    async def _with_engine(self, stop: asyncio.Event, heartbeat: asyncio.Task[None]) -> None:
        halted = asyncio.create_task(stop.wait())
        starting = asyncio.create_task(self._start_engine())
        await asyncio.wait([starting, halted, heartbeat], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            await _cancel(starting, halted)  # a start that is cancelled leaves nothing behind
            if heartbeat.done():
                heartbeat.result()
            return
        engine = starting.result()
        self.served = True
        self._gate, engine.gate.changed = engine.gate, self._clock
        self._enter("running")
        holder = Holder(address_towards(self._stream.redis))
        weights = self._weights = self._worker_of(engine, holder)
        loops = [asyncio.create_task(weights.run()), asyncio.create_task(self._lease(engine, weights))]
        if bounds := self._settings.rollout.adaptive:
            size = self._settings.stream.group_size
            loops.append(asyncio.create_task(adapt(self._slots, engine.load, bounds, size)))
        watched: list[asyncio.Future[Any]] = [*loops, heartbeat, self._failed]
        try:
            await asyncio.wait([*watched, halted], return_when=asyncio.FIRST_COMPLETED)
            for task in watched:
                if task.done():
                    task.result()
            self._enter("draining")
            await _cancel(loops[1])
            await self._drain()
        except EngineError:
            engine.kill()
            raise
        finally:
            await _cancel(*loops, halted, *self._tasks.values())
            await asyncio.gather(engine.stop(), self._rewards.close(), self._environment.close())
            holder.close()

    def _worker_of(self, engine: Engine, holder: Holder) -> WeightWorker:
        return WeightWorker(
            self._stream,
            engine,
            holder,
            self._settings.weightsync,
            actor=self._name,
            epoch=self.epoch,
            lag=self._settings.stream.max_staleness,
            applied=self._on_applied,
        )

    async def _start_engine(self) -> Engine:
        started = time.monotonic()
        log_file = self._logs / f"{self._name}-engine.log"
        engine = await Engine.start(
            self._model,
            self._settings.engine,
            name=self._name,
            seed=self._settings.seed,
            log=log_file,
            routed=self._settings.objective.routing_replay,
        )
        log.info("engine ready after %.1f s, waiting for weights", time.monotonic() - started)
        return engine

    def _on_applied(self, version: int) -> None:
        self._version = version
        self._newer.set()
        self._changed.set()  # others learn at once that this one holds it

    async def _serves(self, version: int) -> None:
        """Waits until the engine serves at least this version."""
        while self._version < version:
            self._newer.clear()
            await self._newer.wait()

    def _clock(self) -> None:
        """Notes how the engine is used from now on."""
        if self._gate is not None:
            requests, updating = self._gate.within, not self._gate.is_open
            self._use.note(leases=len(self._tasks), requests=requests, updating=updating)

    async def _lease(self, engine: Engine, weights: WeightWorker) -> None:
        """Keeps `concurrency` groups in flight, until one fails for a reason that others would fail for.

        One more lease is taken in advance, so that the engine does not wait for it when a group ends; but not
        where leases are short, as it would wait here while another engine is idle.
        """
        recipe, plenty = self._recipe(), False
        while True:
            place = await self._slots.acquire(advance=plenty)
            if self._failed.done():
                return
            lease = await self._admit()
            if lease.status == "lease":
                self._tasks[lease.token] = asyncio.create_task(self._work(engine, lease, recipe, place))
                self._clock()
                plenty = self._settings.stream.max_staleness > 0
            else:
                place.release()
                plenty = False
                if lease.reason in ("no-weights", "old-weights"):
                    await weights.say_again()
                if not self._slots.full:  # else what becomes free is for those that could begin at once
                    await self._stream.take(self._stream.key("places"), _WAIT_S)

    async def _admit(self) -> Lease:
        """One lease, or the reason to wait; a server that is full is asked again."""
        self._requests += 1
        call = Admit(self._name, self.epoch, self._requests, secrets.token_hex(16))
        while True:
            try:
                return await self._stream.call(call)
            except RedisFull as error:
                log.warning("no lease for now: %s", error)
                await asyncio.sleep(BACK_OFF_S)

    def _recipe(self) -> Recipe:
        return Recipe(
            actor=self._name,
            actor_epoch=int(self.epoch.partition(":")[0]),
            run_seed=self._settings.seed,
            group_size=self._settings.stream.group_size,
            sampling=self._settings.rollout.sampling,
            environment=self._environment,
            timeout_s=self._settings.rollout.environment.timeout_s,
            rewards=self._rewards,
            text=Tokens(self._model / "tokenizer.json"),
            invalid=self._invalid,
        )

    async def _work(self, engine: Engine, lease: Lease, recipe: Recipe, place: Place) -> None:
        """One lease to its end: published, or handed back with the reason."""
        reason = "released"
        self._ahead.add(lease.token)
        try:
            await self._serves(lease.version)
            await place.begin()
            self._ahead.discard(lease.token)
            group = await rollout(engine, lease, recipe, place.generated)
            if missing := recipe.group_size - len(group.samples):
                log.warning(
                    "group %s: %d invalid samples left out; so far %s",
                    lease.group,
                    missing,
                    dict(self._invalid),
                )
            if self._settings.stream.dynamic_sampling and teaches_nothing(group):
                reason = "filtered"
                await self._note(group)
                return
            self._publishing.add(lease.token)
            handed_in = publish(self._stream, group, epoch=self.epoch, token=lease.token)
            answer, _ = await asyncio.gather(handed_in, self._note(group))
            reason = ""
            if answer.status == "ok":
                self._published += 1
                self._tokens += sum(sample.answer_length for sample in group.samples)
            else:
                log.warning("group %s was %s: %s", lease.group, answer.status, answer.reason)
        except RewardError as error:
            reason = "reward"
            log.error("group %s: %s", lease.group, error)
        except Exception as error:  # noqa: BLE001 - the actor ends with it: others would fail, too
            reason = "engine" if isinstance(error, EngineError) else reason
            if not self._failed.done():
                self._failed.set_exception(error)
        finally:
            del self._tasks[lease.token]
            self._ahead.discard(lease.token)
            self._publishing.discard(lease.token)
            place.release()
            self._clock()
            if reason in ("reward", "engine", "filtered"):
                await self._stream.call(Drop(self._name, self.epoch, lease.token, reason))

    async def _note(self, group: Group) -> None:
        """Counts what became of the group's question."""
        config, rewards = self._settings.rollout, [sample.reward for sample in group.samples]
        await note(self._stream, group.row, rewards, solved=config.solved, failed=config.failed)

    async def _beat(self, stop: asyncio.Event) -> None:
        """Renews the leases in flight and hears whether the run goes on, at once when the state changes."""
        while True:
            self._changed.clear()
            self._clock()
            stats = {
                "in_flight": len(self._tasks),
                "concurrency": self._slots.limit,
                "held_s": round(self._use.held_s, 2),
                "busy_s": round(self._use.busy_s, 2),
                "published": self._published,
                "answer_tokens": self._tokens,
                "invalid_samples": self._invalid.total(),
                **(self._weights.figures() if self._weights is not None else {}),
            }
            tokens = tuple(self._tasks)
            call = Heartbeat(self._name, self.epoch, self._state, msgspec.json.encode(stats).decode(), tokens)
            beat = await self._stream.call(call)
            for token in beat.lost:
                if token in self._tasks and token not in self._publishing:  # that one hears by itself
                    log.warning("lease %s is gone, its group is given up", token.partition(":")[0])
                    self._tasks[token].cancel()
            if beat.ended and not stop.is_set():
                log.info("the run has ended: %s", beat.ended)
                stop.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._settings.stream.lease_s / 3.3)

    def _enter(self, state: str) -> None:
        """Changes what the actor's record says of it: `starting`, `running`, `draining`."""
        self._state = state
        self._changed.set()

    async def _drain(self) -> None:
        """Hands back what has not begun, and finishes the rest within the deadline; what is left then goes
        back to the queue, too."""
        unused = list(self._ahead)
        await _cancel(*(self._tasks[token] for token in unused))
        for token in unused:
            await self._stream.call(Drop(self._name, self.epoch, token, "released"))
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=_DRAIN_S)
        left = await self._stream.call(Leave("actor", self._name, self.epoch))
        returned = len(unused) + left.released
        log.info("left: %d groups published, %d leases handed back", self._published, returned)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_actor(url: str, run: str, name: str, logs: Path) -> None:
    """An actor from start to end; engines that fail are replaced, up to a few times."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stream = AsyncStream.connect(url, run, patience_s=_PATIENCE_S)
    with tempfile.TemporaryDirectory(prefix="slipstream-actor-") as folder:
        settings = await fetch_run(stream, Path(folder), stop)
        stream.shards = settings.stream.shards if settings is not None else 0
        for attempt in range(_RESTARTS):
            if settings is None or stop.is_set():
                break
            actor = Actor(stream, name, settings, Path(folder), logs)
            try:
                await actor.serve(stop)
                break
            except EngineError as error:
                if not actor.served or attempt == _RESTARTS - 1:
                    raise
                log.error("engine lost, starting another: %s", error)
            except Fenced as error:
                if await stream.redis.hget(stream.key("state"), "nonce") != actor.nonce.encode():
                    raise ForeignRun(f"the Redis holds another run of this name: {error}") from error
                if not error.came_back_older:
                    raise
                log.warning("Redis came back older, joining again: %s", error)
            except NoRun as error:
                raise ForeignRun(f"the Redis was wiped or swapped: {error}") from error
    await stream.close()


def main() -> int:
    """Entry point of the actor process: `python -m actors.worker --run R --name N --logs DIR`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format=f"%(asctime)s {args.name}: %(message)s")
    try:
        uvloop.run(run_actor(os.environ["SLIPSTREAM_REDIS"], args.run, args.name, args.logs))
    except Fenced as error:
        log.error("another process took this actor's name: %s", error)
        return 1
    except (ActorError, StreamError, WeightSyncError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
