"""One version's broadcast from the learner: who takes part is settled first, for everybody, and in time.

    learner                              agents
    a store of the version's own
                    <--- joined + 1 ---- each that wants the version, by its offer
    when all have come, at most
    GATHER_S after the first:
                    ---- size ---------> rank < size: in the group; else too late, and it pulls
    send                                 receive

The group has those that came and nobody else; no engine is in it. Every operation has a timeout. Who misses
the round, or is in it when somebody dies, pulls instead.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from weightsync.errors import SourceError, WeightSyncError
from weightsync.protocol import Source

if TYPE_CHECKING:
    from torch.distributed import Store

GATHER_S = 0.5
"""How long a round waits for others once the first agent has come."""
_COUNT_S = 0.005
"""How often it counts them meanwhile."""
_LOOK = timedelta(seconds=0.5)
"""How often a round that nobody comes to looks whether it is closed."""


class Round(ABC):
    """The learner's end: gathers agents, then sends, once; a thread does it.

    In its source `host` is where the round's store listens, `address` the learner's holder, from which the
    manifest is pulled.
    """

    def __init__(
        self, kind: str, address: str, holder: Source, timeout_s: float, live: Callable[[], int] | None
    ) -> None:
        """Listens at a free port of `address`. `holder` is a `peer` source of the same version; `live` says
        how many agents there are, if that is known: once all have come, nobody is waited for."""
        from torch.distributed import PrefixStore, TCPStore

        self.took: int | None = None
        """Agents that have taken it; None before the end."""
        self.timeout, self._live = timedelta(seconds=timeout_s), live
        listener = socket.create_server((address, 0))
        port, token = listener.getsockname()[1], holder.token or secrets.token_hex(16)
        store = TCPStore(
            address,
            port,
            None,
            True,
            self.timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.source = Source(kind, f"{address}:{port}", holder.address, token)
        self._closed = threading.Event()
        self._store = PrefixStore(token, store)
        self._thread = threading.Thread(target=self._run, name=f"weights-{kind}", daemon=True)

    @abstractmethod
    def send(self, store: Store, size: int) -> None:
        """Sends the version to a group of `size`, of which this is rank 0.

        Raises `RuntimeError` or `WeightSyncError`, in time, if that fails.
        """

    @abstractmethod
    def ended(self) -> None:
        """Called at the end of the round, whatever came of it."""

    def begin(self) -> None:
        """Lets agents come."""
        self._thread.start()

    def close(self) -> None:
        """Ends a round that nobody has come to; one under way goes on to its end or timeout."""
        self._closed.set()

    def join(self, timeout_s: float) -> None:
        """Waits for the end of the round."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        took = 0
        try:
            joined = self._gather()
            self._store.set("size", str(joined + 1))
            if joined:
                self.send(self._store, joined + 1)
                took = joined
        except (RuntimeError, WeightSyncError):
            took = 0  # each agent says by itself what it misses, and pulls
        finally:
            self.ended()
            self.took = took

    def _gather(self) -> int:
        """How many agents have come."""
        from torch.distributed import DistStoreError

        while not self._closed.is_set():
            with suppress(DistStoreError):
                self._store.wait(["joined"], _LOOK)
                return self._count(time.monotonic() + GATHER_S)
        return 0

    def _count(self, deadline: float) -> int:
        while (joined := self._store.add("joined", 0)) != (self._live and self._live()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if self._closed.wait(min(left, _COUNT_S)):
                return 0
        return joined


def store_of(source: Source, timeout: timedelta) -> Store:
    """The store of a round, at an agent. Raises `RuntimeError` if the learner is gone."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = source.host.rsplit(":", 1)
    return PrefixStore(source.token, TCPStore(host, int(port), None, False, timeout))


def joined(kind: str, store: Store, version: str) -> tuple[int, int]:
    """(rank, size) of this agent in the round. Raises `SourceError` if it comes too late."""
    rank = store.add("joined", 1)
    size = int(store.get("size"))  # waits until the learner has counted
    if rank >= size:
        raise SourceError(f"{kind}: version {version} is on its way to {size - 1} others already")
    return rank, size
