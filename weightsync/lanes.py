"""The learner's side of the stock transport: every live actor is brought to the newest committed version.

One lane, a thread, an actor: it meets the actor's engine in a two-rank group and sends the newest
version it has not sent. Versions that were overtaken are skipped, the step never waits, and an actor
that fails or is slow costs only its own lane: the lane closes, says so, and a new one opens when the
actor joins again under a new epoch.

    with Lanes(stream, learner_epoch=3, address="127.0.0.1", timeout_s=30, log=print) as lanes:
        lanes.publish(manifest, tensors)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import redis

from buffer.client import Stream
from buffer.ledger import ActorRecord
from weightsync.errors import WeightSyncError
from weightsync.manifest import Manifest
from weightsync.protocol import JoinGroup, Receive, Request, encode_request
from weightsync.transports.stock import StockGroup

if TYPE_CHECKING:
    import torch

_LOOK_S = 0.5
_MAIL_LIFE_S = 600


class _Newest:
    """The newest version, handed to every lane."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.manifest: Manifest | None = None
        self.tensors: Mapping[str, torch.Tensor] = {}

    def put(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        with self.changed:
            self.manifest, self.tensors = manifest, tensors
            self.changed.notify_all()


class _Lane(threading.Thread):
    """Brings one actor, under one epoch, to the newest version until it is closed or fails."""

    def __init__(self, lanes: Lanes, actor: str, epoch: str) -> None:
        super().__init__(name=f"weights-{actor}", daemon=True)
        self.actor, self.epoch = actor, epoch
        self.sent: Manifest | None = None
        self.push_s = 0.0
        self._lanes, self._closed = lanes, False

    def run(self) -> None:
        lanes = self._lanes
        group = None
        try:
            while (newest := self._next()) is not None:
                group = group or self._meet()
                began = time.monotonic()
                self._ask(Receive(self.epoch, group.name, newest[0]))
                group.send(newest[1])
                self.sent, self.push_s = newest[0], time.monotonic() - began
        except (WeightSyncError, redis.RedisError, OSError) as error:
            at = self.sent.version if self.sent else -1
            lanes.log(f"weights: {self.actor} is left behind at version {at}: {error}")
        finally:
            if group is not None:
                group.close()
            self._closed = True

    def _next(self) -> tuple[Manifest, Mapping[str, torch.Tensor]] | None:
        newest = self._lanes.newest
        with newest.changed:
            while not self._closed:
                # Whatever its number: after a fork versions go back.
                if newest.manifest is not None and newest.manifest is not self.sent:
                    return newest.manifest, newest.tensors
                newest.changed.wait()
        return None

    def _meet(self) -> StockGroup:
        lanes = self._lanes
        # Group names cannot be used twice in an engine's life; actor epochs never repeat.
        name = f"weights-{lanes.learner_epoch}-{self.actor}-{self.epoch}"

        def invite(port: int) -> None:
            self._ask(JoinGroup(self.epoch, name, lanes.address, port))

        return StockGroup.open(name, address=lanes.address, timeout_s=lanes.timeout_s, invite=invite)

    def _ask(self, request: Request) -> None:
        key = self._lanes.stream.key(f"mail:{self.actor}")
        self._lanes.stream.redis.rpush(key, encode_request(request))
        self._lanes.stream.redis.expire(key, _MAIL_LIFE_S)

    def close(self) -> None:
        newest = self._lanes.newest
        with newest.changed:
            self._closed = True
            newest.changed.notify_all()


class Lanes:
    """Lanes to all live actors; `publish` gives them a new version and returns at once."""

    def __init__(
        self,
        stream: Stream,
        *,
        learner_epoch: int,
        address: str,
        timeout_s: float,
        log: Callable[[str], None],
    ) -> None:
        self.stream, self.learner_epoch, self.address = stream, learner_epoch, address
        self.timeout_s, self.log = timeout_s, log
        self.newest = _Newest()
        self.export_s = 0.0
        """Seconds it took to make an image: there is none."""
        self._open: dict[str, _Lane] = {}
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="weights-watch", daemon=True)
        self._watcher.start()

    def publish(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Offers a committed version. The tensors must not change afterwards."""
        self.newest.put(manifest, tensors)

    def push_seconds(self) -> dict[str, float]:
        """How long the last push to each actor took, from the request to the last byte sent."""
        return {name: lane.push_s for name, lane in self._open.items() if lane.sent}

    def held_bytes(self) -> int:
        """Memory of the tensors that are offered."""
        return sum(tensor.nbytes for tensor in self.newest.tensors.values())

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            try:
                records: Any = self.stream.redis.hgetall(self.stream.key("actors"))
            except redis.RedisError as error:
                self.log(f"weights: cannot read the actors: {error}")
                continue
            self._match(
                {name.decode(): msgspec.json.decode(r, type=ActorRecord) for name, r in records.items()}
            )

    def _match(self, actors: dict[str, ActorRecord]) -> None:
        """One lane for each actor whose engine is up, under its epoch."""
        for name, lane in list(self._open.items()):
            if name not in actors or actors[name].epoch != lane.epoch:
                lane.close()
                del self._open[name]
        for name, record in actors.items():
            if name not in self._open and record.state != "starting":
                self.stream.redis.delete(self.stream.key(f"mail:{name}"))
                self._open[name] = _Lane(self, name, record.epoch)
                self._open[name].start()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all lanes; a push under way is finished or times out."""
        self._stopped.set()
        self._watcher.join()
        for lane in self._open.values():
            lane.close()
        for lane in self._open.values():
            lane.join(self.timeout_s)
