"""One broadcast from the learner to all agents that are ready for it, between hosts without GPUs.

Who takes part is settled by `weightsync.transports.round`. If anybody dies the others lose no more than
their wait: what they have verified stays, and they pull the rest.

    round = Round(address, manifest, image, timeout_s=60)       # the learner; a thread does the rest
    offer = [round.source, ...]
    round.close()
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from itertools import cycle, islice
from threading import Thread
from typing import TYPE_CHECKING, Any

from weightsync.errors import SourceError
from weightsync.image import Image, populate
from weightsync.manifest import Manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports import round as rounds
from weightsync.transports.peer import Peer

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupGloo, Store, Work

_AHEAD = 1
"""Chunks whose broadcast has begun before the one before has ended."""


class Gloo:
    """An agent's end of a round."""

    kind = "gloo"

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` bounds each operation."""
        self._timeout_s = timeout_s
        self._peer = Peer(timeout_s)

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """While nothing of the version is here yet: a broadcast brings all of it."""
        return staging is None or staging.is_empty

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the learner's holder."""
        return self._peer.manifest(source, version)

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Takes part in the round."""
        host, port = source.host.rsplit(":", 1)
        timeout = timedelta(seconds=self._timeout_s)
        try:
            store = rounds.store_of(source, timeout)
            rank, size = rounds.joined(self.kind, store, version)
            group = [_group(store, rank, size, _own_address(host, int(port)), timeout)]
            try:
                for number, room in _chunks(group, staging, timeout):
                    staging.keep(number, [room])
            finally:  # by a thread, for a group takes some ms to end
                Thread(target=group.clear, name="weights-gloo").start()
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            raise SourceError(
                f"gloo: {source.host}: {told}; the learner, or another agent, is gone"
            ) from error


class Round(rounds.Round):
    """The learner's end: broadcasts the image."""

    def __init__(
        self,
        address: str,
        manifest: Manifest,
        image: Image,
        holder: Source,
        timeout_s: float,
        live: Callable[[], int] | None = None,
    ) -> None:
        """As `rounds.Round`; agents can come at once."""
        super().__init__("gloo", address, holder, timeout_s, live)
        self._address, self._manifest = address, manifest
        self._map = image.private() if image.size else None
        self.begin()

    def send(self, store: Store, size: int) -> None:
        """Broadcasts chunk by chunk."""
        import torch

        group = _group(store, 0, size, self._address, self.timeout)
        assert self._map is not None
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        sending: list[Work] = []
        for chunk in self._manifest.chunks:
            populate(self._map, chunk.offset, chunk.size)  # while the one before is on its way
            sending.append(_broadcast(group, whole[chunk.offset : chunk.offset + chunk.size], self.timeout))
            if len(sending) > _AHEAD:
                sending.pop(0).wait(self.timeout)
        for work in sending:
            work.wait(self.timeout)

    def ended(self) -> None:
        """The image is left to its holder."""
        self._map = None


def _chunks(
    group: list[ProcessGroupGloo], staging: Staging, timeout: timedelta
) -> Iterator[tuple[int, memoryview]]:
    """The missing chunks, in order; while one is used, the next is on its way. `group` may be emptied."""
    import torch

    chunks, left = staging.manifest.chunks, iter(staging.missing())
    longest = staging.manifest.longest
    rooms = cycle([torch.empty(longest, dtype=torch.uint8) for _ in range(1 + _AHEAD)])
    coming: deque[tuple[int, torch.Tensor, Work]] = deque()
    while True:
        for number in islice(left, 1 + _AHEAD - len(coming)):
            room = next(rooms)[: chunks[number].size]
            coming.append((number, room, _broadcast(group[0], room, timeout)))
        if not coming:
            return
        number, room, work = coming.popleft()
        work.wait(timeout)
        yield number, memoryview(room.numpy())


def _group(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> ProcessGroupGloo:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [_device(address)]
    return ProcessGroupGloo(store, rank, size, options)


@cache
def _device(address: str) -> Any:
    """What listens at an address of this host, for all rounds: its thread takes 10 ms to end."""
    from torch.distributed import ProcessGroupGloo

    return ProcessGroupGloo.create_device(hostname=address)


def _broadcast(group: ProcessGroupGloo, tensor: torch.Tensor, timeout: timedelta) -> Work:
    """Begins a broadcast from rank 0."""
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, timeout
    return group.broadcast([tensor], options)


def _own_address(host: str, port: int) -> str:
    """The address of this host on its way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
