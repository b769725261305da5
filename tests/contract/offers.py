"""A learner that offers versions, and actors that take them, on a real Redis; the engines are not real."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from actors.engine import Loaded
from actors.weights import WeightWorker
from buffer.client import AsyncStream, Stream
from buffer.local_server import LocalServer
from buffer.members import Heartbeat, JoinActor
from tests.contract.harness import Run
from tests.unit.weightsync.versions import tensors
from weightsync.config import WeightSyncConfig
from weightsync.holder import Held, Holder
from weightsync.manifest import Manifest
from weightsync.offer import Offers
from weightsync.protocol import Offer, decode_request


class Engine:
    """Serves what it is given, once the test lets it."""

    def __init__(self) -> None:
        self.served: list[str] = []
        self.seconds = 0.0
        self.open = asyncio.Event()
        self.open.set()

    async def load_weights(self, held: Held, *, check: bool) -> Loaded:
        await self.open.wait()
        await asyncio.sleep(self.seconds)
        assert held.image.sealed
        self.served.append(held.manifest.label)
        return Loaded(0.0, "plan")


class Member:
    """An actor of the run: its engine, its worker, its task."""

    def __init__(self, stream: AsyncStream, name: str, config: WeightSyncConfig) -> None:
        self.stream, self.name, self.config = stream, name, config
        self.engine, self.holder = Engine(), Holder("127.0.0.1")
        self.epoch, self.task = "", None

    async def join(self, state: str = "running") -> None:
        joined = await self.stream.call(JoinActor(secrets.token_hex(16), self.name, "host"))
        self.epoch = joined.epoch
        self.worker = WeightWorker(
            self.stream,
            self.engine,  # type: ignore[arg-type]
            self.holder,
            self.config,
            actor=self.name,
            epoch=self.epoch,
            lag=1,
            applied=lambda version: None,
        )
        await self.beat(state)

    async def beat(self, state: str = "running") -> None:
        stats = msgspec.json.encode(self.worker.figures()).decode()
        await self.stream.call(Heartbeat(self.name, self.epoch, state, stats, ()))

    def work(self) -> None:
        self.task = asyncio.create_task(self.worker.run())

    async def mail(self) -> list[Offer]:
        """What waits for it, unread."""
        found: Any = await self.stream.redis.lrange(self.stream.key(f"mail:{self.name}"), 0, -1)
        return [request for request in map(decode_request, found) if isinstance(request, Offer)]

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.holder.close()


class Scene:
    """A run with its offers and members; a version is committed by writing it down, without steps."""

    def __init__(self, server: LocalServer, config: WeightSyncConfig) -> None:
        name = f"offers-{secrets.token_hex(4)}"
        self.learner = Stream.connect(server.socket_url, name)
        self.learner.load_library()
        self.run = Run(self.learner)
        self.run.join_learner()
        self.actors = AsyncStream.connect(server.socket_url, name)
        self.config, self.log = config, list[str]()
        self.members: list[Member] = []
        self.offers = self._offers()

    def _offers(self) -> Offers:
        epoch = int(self.run.epochs["learner"].partition(":")[0])
        return Offers(self.learner, learner_epoch=epoch, config=self.config, log=self.log.append).__enter__()

    def member(self, name: str) -> Member:
        self.members.append(Member(self.actors, name, self.config))
        return self.members[-1]

    def publish(self, number: int, *, commit: bool = True) -> str:
        weights = tensors(number)
        manifest = Manifest.of(number, weights)
        if commit:
            self.learner.redis.hset(self.learner.key("versions"), str(number), manifest.digest)
        self.offers.publish(manifest, weights)
        return manifest.label

    async def close(self) -> None:
        for member in self.members:
            await member.close()
        await asyncio.to_thread(self.offers.__exit__, None, None, None)
        await self.actors.close()
        self.learner.close()


Make = Callable[..., Scene]
