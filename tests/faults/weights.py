"""Weight sync between scripted processes: the real offers, agent, transports; the engine is a script.

A learner offers its vector as four chunks; its point is `sending`, once for each chunk that it
sends. An actor pulls, and serves a version once every byte of it is that of its digest; its point is
`loading`.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import BinaryIO

import msgspec
import numpy as np
import torch

import actors.weights
import weightsync.offer
from actors.engine import Loaded
from actors.weights import WeightWorker
from buffer.client import Stream
from buffer.errors import StreamError
from tests.faults.actor import Actor, ActorSettings
from tests.faults.points import Faults, Log
from tests.faults.policy import SIZE, digest
from weightsync.config import WeightSyncConfig
from weightsync.holder import Held, Holder
from weightsync.image import chunk_ranges, write_image
from weightsync.manifest import Manifest
from weightsync.offer import Offers
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.peer import Peer

CHUNKS = 4
TIMEOUT_S = 2.0
"""Seconds after which the learner names an actor that stays behind, and an agent gives a holder up."""
CONFIG = WeightSyncConfig(transport="peer", timeout_s=TIMEOUT_S)
_CHUNK = 4 * SIZE // CHUNKS


def offers(stream: Stream, epoch: int, log: Log, faults: Faults) -> Offers:
    """The learner's side."""
    weightsync.offer.write_image = partial(write_image, chunk_bytes=_CHUNK)  # type: ignore[assignment]
    made = Offers(stream, learner_epoch=epoch, config=CONFIG, log=lambda text: log("weights", text=text))
    send = made.holder.send

    def counted(connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
        for offset, size in chunk_ranges(count, _CHUNK):
            faults.at("sending")
            send(connection, image, first + offset, size)

    made.holder.send = counted  # type: ignore[method-assign]
    log("serves", port=int(made.holder.url.rpartition(":")[2]))
    return made


def publish(made: Offers, version: int, weights: np.ndarray) -> None:
    """Offers a version under the digest by which it was committed."""
    tensors = {"weights": torch.from_numpy(weights.copy())}
    named = msgspec.structs.replace(Manifest.of(version, tensors), digest=digest(weights))
    made.publish(named, tensors)


class PullingActor(Actor):
    """An actor that serves what it has pulled, and nothing else."""

    def __init__(self, settings: ActorSettings, log: Log, faults: Faults) -> None:
        super().__init__(settings, log, faults)
        self.holder = Holder("127.0.0.1")
        self.worker: WeightWorker | None = None
        if settings.weights_port:
            through = Through(TIMEOUT_S, settings.weights_port)
            actors.weights.transports = lambda _: [through]  # type: ignore[assignment]

    async def load_weights(self, held: Held, *, check: bool) -> Loaded:
        """Serves a version, which must be whole."""
        weights, manifest = np.frombuffer(held.image.readable(), np.float32), held.manifest
        self.faults.at("loading")
        if digest(weights) != manifest.digest:
            raise StreamError(f"version {manifest.label}: got bytes of {digest(weights)}")
        self.version, self.digest = manifest.version, manifest.digest
        self.log("loaded", version=manifest.version)
        return Loaded(0.0, "plan")

    async def _apply(self) -> None:
        self.worker = WeightWorker(
            self.stream,
            self,  # type: ignore[arg-type]
            self.holder,
            CONFIG,
            actor=self.settings.name,
            epoch=self.epoch,
            lag=1,
            applied=self._applied,
        )
        await self.worker.run()

    def _applied(self, version: int) -> None:
        self.declared = True
        self.log("applied", version=version)

    def _stats(self) -> str:
        return msgspec.json.encode(self.worker.figures() if self.worker else {}).decode()

    def _behind(self) -> None:
        """Admission wants a newer version: it comes when it can be pulled."""


class Through(Peer):
    """Pulls by way of a proxy before the learner's holder, whoever was offered."""

    def __init__(self, timeout_s: float, port: int) -> None:
        super().__init__(timeout_s)
        self._port = port

    def manifest(self, source: Source, version: str) -> bytes:
        return super().manifest(self._by(source), version)

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        super().fetch(self._by(source), version, staging)

    def _by(self, source: Source) -> Source:
        return msgspec.structs.replace(source, address=f"http://127.0.0.1:{self._port}")
