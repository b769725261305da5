"""The actor's side of weight sync: hears what the learner offers, and has the engine serve it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import redis

from actors.engine import Engine, Loaded
from buffer.client import AsyncStream, raise_if_cancelled
from buffer.errors import UncommittedVersion
from buffer.ledger import ActorRecord
from buffer.members import Applied
from weightsync.agent import Agent, Standing
from weightsync.config import WeightSyncConfig
from weightsync.holder import Held, Holder
from weightsync.manifest import Manifest
from weightsync.protocol import JoinGroup, Offer, Receive, Request, Score, Scores, Source, decode_request
from weightsync.transports.choice import transports

log = logging.getLogger("actor")

_LISTEN_S = 1
_SCORES_LIFE_S = 600


class WeightWorker:
    """Answers the learner's requests to one actor under one epoch, and keeps its engine up to date.

    The engine serves one version entirely or another entirely. `EngineError` ends `run`; the engine's state
    is then unknown and its process group must be killed.
    """

    def __init__(
        self,
        stream: AsyncStream,
        engine: Engine,
        holder: Holder,
        config: WeightSyncConfig,
        *,
        actor: str,
        epoch: str,
        lag: int,
        applied: Callable[[int], None],
    ) -> None:
        """`lag`: how many versions behind one may be and its groups still be trained; eta."""
        self._stream, self._engine, self._holder, self._check = stream, engine, holder, config.check
        self._actor, self._epoch, self._applied = actor, epoch, applied
        self._serving: Applied | None = None
        self._loaded = Loaded(0.0, "")
        self._agent = Agent(holder, transports(config), engine=self, registry=self, lag=lag, log=log.info)

    async def run(self) -> None:
        """Answers requests until cancelled. Raises `EngineError`."""
        tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._agent.run())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def say_again(self) -> None:
        """Says once more which version the engine serves: a Redis that came back older has forgotten it."""
        if self._serving is not None:
            with contextlib.suppress(UncommittedVersion):  # the learner has not brought it forward yet
                await self._stream.call(self._serving)

    def figures(self) -> dict[str, Any]:
        """What heartbeats say of the weights: state, transport, seconds, and what others may pull here."""
        agent = self._agent
        held = {label: self._holder.sources(label) for label in self._holder.labels()}
        return {
            "weights": agent.state,
            "transport": agent.way,
            "stage_s": round(agent.stage_s, 4),
            "apply_s": round(agent.apply_s, 4),
            "pause_s": round(self._loaded.pause_s, 4),
            "load": self._loaded.way,
            "holds": msgspec.json.encode(held).decode(),
        }

    async def serve(self, held: Held) -> None:
        """Has the engine serve a staged version, and says so. Raises `Untouched`, `EngineError`."""
        self._loaded = await self._engine.load_weights(held, check=self._check)
        await self._said(held.manifest)

    async def standing(self, offer: Offer) -> Standing:
        """Whether an offered version is the committed one, as Redis knows it now."""
        digest = await self._field("versions", str(offer.version))
        if digest:
            return "committed" if digest == offer.digest else "void"
        epoch = await self._field("epochs", "learner")
        return "open" if epoch.partition(":")[0] == str(offer.epoch) else "void"

    async def siblings(self, label: str) -> list[Source]:
        """Where other actors say that they hold a version; none while Redis is away."""
        raise_if_cancelled()
        try:
            records: Any = await self._stream.redis.hgetall(self._stream.key("actors"))
        except redis.RedisError:
            return []
        found = []
        for name, packed in records.items():
            stats = msgspec.json.decode(packed, type=ActorRecord).stats
            if name.decode() != self._actor and "holds" in stats:
                held = msgspec.json.decode(stats["holds"], type=dict[str, list[Source]])
                found += held.get(label, [])
        return found

    async def _field(self, key: str, name: str) -> str:
        found: Any = await self._stream.patiently(
            lambda: self._stream.redis.hget(self._stream.key(key), name)
        )
        return found.decode() if found else ""

    async def _listen(self) -> None:
        key = self._stream.key(f"mail:{self._actor}")
        while True:
            mail = await self._stream.take(key, _LISTEN_S)
            if mail is None:
                continue
            request = decode_request(mail)
            if request.actor_epoch == self._epoch:
                await self._answer(request)

    async def _answer(self, request: Request) -> None:
        match request:
            case Offer():
                self._agent.hear(request)
            case JoinGroup(group=group, address=address, port=port):
                await self._engine.join_group(group=group, address=address, port=port)
            case Receive(group=group, manifest=manifest):
                await self._engine.update_weights(group=group, manifest=manifest)
                await self._said(manifest)
            case Score(request=number, sequences=sequences):
                label, found = await self._engine.score(sequences)
                scores = Scores(number, label, [values.tolist() for values in found])
                key = self._stream.key(f"scores:{self._actor}")
                await self._stream.redis.rpush(key, msgspec.json.encode(scores))
                await self._stream.redis.expire(key, _SCORES_LIFE_S)

    async def _said(self, manifest: Manifest) -> None:
        """Tells Redis which version the engine serves."""
        call = Applied(self._actor, self._epoch, manifest.version, manifest.digest)
        await self._stream.call(call)
        self._serving = call
        self._applied(manifest.version)
