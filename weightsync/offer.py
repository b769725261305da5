"""The learner's side of weight sync: what it exported is held, and offered to every live actor.

    with Offers(stream, learner_epoch=3, config=config, log=print) as offers:
        offers.publish(manifest, tensors)       # returns at once

A thread turns the newest export into a sealed image while the learner trains on; one that was overtaken
before its turn is never made, so at most one waits, one is being written, whose memory is taken ahead, and
two are held. Actors are told by mail and pull; nobody waits for them. One that does not take a version in
time is named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import redis

from buffer.client import Stream
from buffer.ledger import ActorRecord
from weightsync.config import WeightSyncConfig
from weightsync.errors import WeightSyncError
from weightsync.holder import Held, Holder
from weightsync.image import Image, write_image
from weightsync.lanes import Lanes
from weightsync.manifest import Manifest, digest_of
from weightsync.protocol import Offer, Source, encode_request
from weightsync.route import address_towards
from weightsync.transports import gloo, nccl
from weightsync.transports.delta import deltas
from weightsync.transports.disk import save
from weightsync.transports.round import Round

if TYPE_CHECKING:
    import torch

    from weightsync.on_gpu import OnGpu

_LOOK_S = 0.5
_MAIL_LIFE_S = 600
_MAIL_KEPT = 64
"""Requests that wait for an actor which reads none: only the newest version matters."""


class Offers:
    """Versions held and offered; `publish` gives it a new one."""

    def __init__(
        self,
        stream: Stream,
        *,
        learner_epoch: int,
        config: WeightSyncConfig,
        log: Callable[[str], None],
        lineage: Callable[[], int] = lambda: 0,
        kept_on_disk: int = 4,
    ) -> None:
        """`lineage`: that of now, which a fork changes. `kept_on_disk`: versions that stay in the folder."""
        self.stream, self.config, self.log = stream, config, log
        self._epoch, self._lineage, self._kept_on_disk = learner_epoch, lineage, kept_on_disk
        self._address = config.address or address_towards(stream.redis)
        self.holder = Holder(self._address)
        self._round: Round | None = None
        self._on_gpu: OnGpu | None = None
        if config.gpu:
            from weightsync.on_gpu import open_on_gpu

            self._on_gpu = open_on_gpu(log)
        self.export_s = 0.0
        """Seconds in which the thread made the last image, its digests and what else is offered of it."""
        self._changed, self._inviting = threading.Condition(), threading.Lock()
        self._waiting: tuple[Manifest, Mapping[str, torch.Tensor]] | None = None
        self._offered: Held | None = None
        self._sources: list[Source] = []
        self._actors: dict[str, ActorRecord] = {}
        self._invited: dict[str, tuple[str, str]] = {}
        """Actor -> (its epoch, the label it was told of last)."""
        self._moved: dict[str, tuple[int, float, bool]] = {}
        """Actor -> (its version, since when there is a newer one to have, whether that was said)."""
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._export, name="weights-export", daemon=True),
            threading.Thread(target=self._watch, name="weights-watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def publish(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Offers a version, committed or about to be. The tensors must not change afterwards."""
        named = msgspec.structs.replace(manifest, lineage=self._lineage(), epoch=self._epoch)
        with self._changed:
            self._waiting = (named, tensors)
            self._changed.notify_all()

    def push_seconds(self) -> dict[str, float]:
        """How long the last version took each actor, in staging and in applying, as it says itself."""
        return {
            name: record.stats["stage_s"] + record.stats["apply_s"]
            for name, record in self._actors.items()
            if record.version >= 0 and "stage_s" in record.stats
        }

    def held_bytes(self) -> int:
        """As `Holder.held_bytes`."""
        return self.holder.held_bytes()

    def _export(self) -> None:
        """Turns what was published into images, the newest first and only."""
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                self._hold(*job)
            except (WeightSyncError, OSError, RuntimeError, MemoryError) as error:
                self.log(f"weights: version {job[0].version} cannot be offered: {error}")
                continue
            self.export_s = time.monotonic() - began
            self._tell()
            self.holder.reserve.refill()

    def _next(self) -> tuple[Manifest, Mapping[str, torch.Tensor]] | None:
        with self._changed:
            while self._waiting is None and not self._stopped:
                self._changed.wait()
            job, self._waiting = self._waiting, None
            return None if self._stopped else job

    def _hold(self, named: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes the image of a version, and holds it."""
        before = self._offered
        parent = before.manifest.digest if before is not None and self.config.delta else ""
        named = msgspec.structs.replace(named, parent=parent)
        image, manifest = write_image(named, tensors, allocate=self.holder.reserve.allocate)
        if self._round is not None:
            self._round.close()
        if self._on_gpu is not None:
            manifest = self._on_gpu.take(manifest, image)
        held = self.holder.keep(manifest, image, self._delta(before, manifest, image) if parent else None)
        sources = self.holder.sources(manifest.label)
        if self.config.folder:
            root = Path(self.config.folder)
            sources.append(save(root, manifest, image, self._kept_on_disk))
        if self._on_gpu is not None:
            sources += self._on_gpu.sources(held)
        (holder,) = [source for source in sources if source.kind == "peer"]
        self._round = self._round_of(manifest, image, holder)
        if self._round is not None:
            sources.append(self._round.source)
        with self._inviting:
            self._offered, self._sources = held, sources

    def _round_of(self, manifest: Manifest, image: Image, holder: Source) -> Round | None:
        """The broadcast of a version, if it goes by one."""
        if self.config.transport == "gloo":
            return gloo.Round(self._address, manifest, image, holder, self.config.timeout_s, self._live)
        if self.config.transport == "nccl" and self._on_gpu and self._on_gpu.holds(manifest.label):
            assert self._on_gpu.slot is not None
            return nccl.Round(
                self._address,
                self._on_gpu.slot,
                manifest,
                holder,
                self.config.timeout_s,
                self._on_gpu.group,
                self._live,
            )
        return None

    def _live(self) -> int:
        """How many actors are told of versions."""
        return len(self._up())

    def _delta(self, before: Held | None, manifest: Manifest, image: Image) -> list[bytes] | None:
        if before is None or before.image is None or before.manifest.layout != manifest.layout:
            return None
        return deltas(manifest, before.image, image)

    def _tell(self) -> None:
        """Invites; actors that a Redis which is away hides now are told at a later look."""
        try:
            self._invite()
        except redis.RedisError as error:
            self.log(f"weights: cannot tell the actors: {error}")

    def _invite(self) -> None:
        """Tells every live actor whose engine is up of the newest version, once."""
        with self._inviting:
            held, sources = self._offered, self._sources
            if held is None:
                return
            for name, record in self._up().items():
                told = (record.epoch, held.manifest.label)
                if self._invited.get(name) != told:
                    self._mail(name, record.epoch, held, sources)
                    self._invited[name] = told

    def _mail(self, name: str, epoch: str, held: Held, sources: list[Source]) -> None:
        manifest = held.manifest
        offer = Offer(
            epoch,
            manifest.version,
            manifest.digest,
            manifest.lineage,
            manifest.epoch,
            digest_of(held.encoded),
            sources,
        )
        key = self.stream.key(f"mail:{name}")
        with self.stream.redis.pipeline(transaction=False) as pipe:
            if self._invited.get(name, ("", ""))[0] != epoch:
                pipe.delete(key)
            pipe.rpush(key, encode_request(offer))
            pipe.ltrim(key, -_MAIL_KEPT, -1)
            pipe.expire(key, _MAIL_LIFE_S)
            pipe.execute()

    def _up(self) -> dict[str, ActorRecord]:
        """The actors whose engine is up: they are told of versions."""
        return {name: record for name, record in self._actors.items() if record.state != "starting"}

    def _watch(self) -> None:
        """Looks who is there; newcomers are told, and those that stay behind are named."""
        while True:
            try:
                records: Any = self.stream.redis.hgetall(self.stream.key("actors"))
                self._actors = {
                    name.decode(): msgspec.json.decode(packed, type=ActorRecord)
                    for name, packed in records.items()
                }
            except redis.RedisError as error:
                self.log(f"weights: cannot see the actors: {error}")
            self._tell()
            self._name_those_behind()
            with self._changed:
                if self._stopped or self._changed.wait_for(lambda: self._stopped, _LOOK_S):
                    return

    def _name_those_behind(self) -> None:
        """Says, once for each version an actor stands at, that it has had time to move on and has not."""
        held, now = self._offered, time.monotonic()
        if held is None:
            return
        for name, record in self._actors.items():
            version, since, said = self._moved.get(name, (-2, now, False))
            if record.version != version or record.version == held.manifest.version:
                since, said = now, False
            if not said and now - since > self.config.timeout_s:
                said = True
                state = record.stats.get("weights", "nothing")
                self.log(
                    f"weights: {name} is left behind at version {record.version} of {held.manifest.version}: "
                    f"no other for {self.config.timeout_s:g} s; it said last: {state}"
                )
            self._moved[name] = (record.version, since, said)

    def __enter__(self) -> Offers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads and the server; agents that are pulling turn to others."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.holder.reserve.close()  # which may be taking memory still
        for thread in self._threads:
            thread.join()
        if self._round is not None:
            self._round.close()
        if self._on_gpu is not None:
            self._on_gpu.close()
        self.holder.close()


def open_offers(
    stream: Stream,
    config: WeightSyncConfig,
    *,
    learner_epoch: int,
    lineage: Callable[[], int],
    kept_on_disk: int,
    log: Callable[[str], None],
) -> Offers | Lanes:
    """The learner's side of the configured transport."""
    if config.transport == "stock":
        address = config.address or address_towards(stream.redis)
        return Lanes(
            stream, learner_epoch=learner_epoch, address=address, timeout_s=config.timeout_s, log=log
        )
    return Offers(
        stream,
        learner_epoch=learner_epoch,
        config=config,
        log=log,
        lineage=lineage,
        kept_on_disk=kept_on_disk,
    )
