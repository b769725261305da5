"""The actor's side of weight sync: does what the learner asks for by mail, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from actors.engine import Engine
from buffer.client import AsyncStream
from buffer.errors import UncommittedVersion
from buffer.members import Applied
from weightsync.protocol import JoinGroup, Receive, Request, Score, Scores, decode_request

_LISTEN_S = 1
_SCORES_LIFE_S = 600


class WeightWorker:
    """Answers the learner's requests to one actor under one epoch.

    After `Receive` the engine serves the new version entirely: the server waits for running requests
    before the update and holds new ones back. `EngineError` ends `run`; the engine's state is then
    unknown and its process group must be killed.
    """

    def __init__(
        self, stream: AsyncStream, engine: Engine, *, actor: str, epoch: str, applied: Callable[[int], None]
    ) -> None:
        self._stream, self._engine = stream, engine
        self._actor, self._epoch, self._applied = actor, epoch, applied
        self._label = ""
        self._serving: Applied | None = None

    async def run(self) -> None:
        """Answers requests until cancelled. Raises `EngineError`."""
        key = self._stream.key(f"mail:{self._actor}")
        while True:
            mail = await self._stream.take(key, _LISTEN_S)
            if mail is None:
                continue
            request = decode_request(mail)
            if request.actor_epoch == self._epoch:
                await self._answer(request)

    async def say_again(self) -> None:
        """Says once more which version the engine serves: a Redis that came back older has forgotten it."""
        if self._serving is not None:
            with contextlib.suppress(UncommittedVersion):  # the learner has not brought it forward yet
                await self._stream.call(self._serving)

    async def _answer(self, request: Request) -> None:
        match request:
            case JoinGroup(group=group, address=address, port=port):
                await self._engine.join_group(group=group, address=address, port=port)
            case Receive(group=group, manifest=manifest):
                await self._engine.update_weights(group=group, manifest=manifest)
                call = Applied(self._actor, self._epoch, manifest.version, manifest.digest)
                await self._stream.call(call)
                self._serving, self._label = call, manifest.label
                self._applied(manifest.version)
            case Score(request=number, sequences=sequences):
                found = await self._engine.score(sequences)
                scores = Scores(number, self._label, [values.tolist() for values in found])
                key = self._stream.key(f"scores:{self._actor}")
                await self._stream.redis.rpush(key, msgspec.json.encode(scores))
                await self._stream.redis.expire(key, _SCORES_LIFE_S)
