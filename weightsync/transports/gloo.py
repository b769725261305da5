"""One broadcast from the learner to all agents that are ready for it, between hosts without GPUs.

A round is one version's: agents come to its store, for `GATHER_S` from the first one on; whoever has come
then is in the group, whoever comes later pulls instead. Only agents are in it, never engines; every
operation has a timeout, and if anybody dies the others lose no more than that: what they have verified
stays, and they pull the rest.

    round = Round(address, manifest, image, timeout_s=60)       # the learner; a thread does the rest
    offer = [round.source, ...]
    round.close()
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weightsync.errors import SourceError
from weightsync.image import Image, populate
from weightsync.manifest import Manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.peer import Peer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupGloo, Store

GATHER_S = 0.5
"""How long a round waits for others once the first agent has come."""
_LOOK_S = 0.02


class Gloo:
    """An agent's end of a round.

    In its sources `host` is where the round's store listens, `address` the learner's holder, from which the
    manifest is pulled.
    """

    kind = "gloo"

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` bounds each operation."""
        self._timeout_s = timeout_s
        self._peer = Peer(timeout_s)

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """While nothing of the version is here yet: a broadcast brings all of it."""
        return staging is None or len(staging.missing()) == len(staging.manifest.chunks)

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the learner's holder."""
        return self._peer.manifest(source, version)

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Takes part in the round."""
        import torch
        from torch.distributed import PrefixStore, TCPStore

        host, port = source.host.rsplit(":", 1)
        timeout = timedelta(seconds=self._timeout_s)
        try:
            store = PrefixStore(source.token, TCPStore(host, int(port), None, False, timeout))
            rank = store.add("joined", 1)
            size = int(store.get("size"))  # waits until the learner has counted
            if rank >= size:
                raise SourceError(f"gloo: version {version} is on its way to {size - 1} others already")
            group = _group(store, rank, size, _own_address(host, int(port)), timeout)
            # Not into the room itself: a broadcast that failed may still write to where it was told to.
            buffer = torch.empty(staging.manifest.chunks[0].size, dtype=torch.uint8)
            for number in staging.missing():
                part = buffer[: staging.manifest.chunks[number].size]
                _broadcast(group, part, timeout)
                with staging.room(number) as room:
                    room[:] = memoryview(part.numpy())
                staging.keep(number)
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            raise SourceError(
                f"gloo: {source.host}: {told}; the learner, or another agent, is gone"
            ) from error


class Round:
    """The learner's end: gathers agents, then broadcasts the image, once."""

    def __init__(
        self, address: str, manifest: Manifest, image: Image, holder: Source, timeout_s: float
    ) -> None:
        """Listens at a free port of `address`. `holder` is a `peer` source of the same version."""
        from torch.distributed import PrefixStore, TCPStore

        self.took: int | None = None
        """Agents that have taken it; None before the end."""
        self._address, self._manifest, self._timeout = address, manifest, timedelta(seconds=timeout_s)
        listener = socket.create_server((address, 0))
        port, token = listener.getsockname()[1], holder.token or secrets.token_hex(16)
        store = TCPStore(
            address,
            port,
            None,
            True,
            self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.source = Source("gloo", f"{address}:{port}", holder.address, token)
        self._closed = threading.Event()
        self._map = image.private() if image.size else None
        self._store = PrefixStore(token, store)
        self._thread = threading.Thread(target=self._run, name="weights-gloo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends a round that nobody has come to; one under way goes on to its end or timeout."""
        self._closed.set()

    def join(self, timeout_s: float) -> None:
        """Waits for the end of the round."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        joined = self._gather()
        self._store.set("size", str(joined + 1))
        if joined == 0:
            self.took = 0
            return
        try:
            self._send(joined + 1)
            self.took = joined
        except RuntimeError:
            self.took = 0  # each agent says by itself what it misses, and pulls

    def _gather(self) -> int:
        """How many agents have come."""
        deadline = None
        while not self._closed.is_set():
            joined = self._store.add("joined", 0)
            if joined and deadline is None:
                deadline = time.monotonic() + GATHER_S
            if deadline is not None and time.monotonic() > deadline:
                return joined
            time.sleep(_LOOK_S)
        return 0

    def _send(self, size: int) -> None:
        import torch

        group = _group(self._store, 0, size, self._address, self._timeout)
        assert self._map is not None
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        for chunk in self._manifest.chunks:
            populate(self._map, chunk.offset, chunk.size)
            _broadcast(group, whole[chunk.offset : chunk.offset + chunk.size], self._timeout)


def _group(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> ProcessGroupGloo:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return ProcessGroupGloo(store, rank, size, options)


def _broadcast(group: ProcessGroupGloo, tensor: Any, timeout: timedelta) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, timeout
    group.broadcast([tensor], options).wait(timeout)


def _own_address(host: str, port: int) -> str:
    """The address of this host on its way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
