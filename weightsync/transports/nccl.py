"""One broadcast from the learner's GPU to those of all agents that are ready, and from there by CUDA IPC.

Who takes part is settled by `weightsync.transports.round`. Agents are in the group, never engines: an
agent receives into a slot of its own on its engine's GPU (`weightsync.slot`), verifies every chunk there,
and its engine copies from it. For this an agent has a CUDA context, about half a GB, and the version.

The group is kept for the next version if the same agents, and nobody else, come to its round: each says
which one it has, and the learner says which one it is to be.

NCCL takes one rank a GPU. An agent that shares the learner's GPU, or another agent's, is not in the group; it
gets the version by `cuda_ipc`, or pulls.

    round = Round(address, slot, manifest, holder, 60, group)   # the learner; a thread does the rest
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from weightsync.errors import SourceError
from weightsync.guard import Place, lease
from weightsync.manifest import Manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports import round as rounds
from weightsync.transports.peer import Peer

if TYPE_CHECKING:
    from torch.distributed import Store

    from weightsync.communicator import Group
    from weightsync.slot import Slot


class Nccl:
    """An agent's end of a round; it uses the first GPU that it sees, which is its engine's."""

    kind = "nccl"

    def __init__(self, timeout_s: float, cards: Sequence[str]) -> None:
        """`timeout_s` bounds each operation. `cards`: the GPUs that this process sees."""
        self._timeout_s, self._cards = timeout_s, cards
        self._peer = Peer(timeout_s)
        self._slot: Slot | None = None
        self._group: Group | None = None

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """While nothing of the version is here yet: a broadcast brings all of it."""
        return staging is None or staging.is_empty

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from the learner's holder."""
        return self._peer.manifest(source, version)

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Takes part in the round."""
        timeout = timedelta(seconds=self._timeout_s)
        try:
            store = rounds.store_of(source, timeout)
            claim(store, self._cards[0])
            slot = self._room(staging.manifest.size)
            rank, size = rounds.joined(self.kind, store, version)
            self._receive(store, slot, rank, size, staging)
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            raise SourceError(
                f"nccl: {source.host}: {told}; the learner, or another agent, is gone"
            ) from error
        staging.put(Place(slot.guard.path))

    def _receive(self, store: Store, slot: Slot, rank: int, size: int, staging: Staging) -> None:
        """The version from the group into the slot, verified there."""
        from weightsync.checksum import verify
        from weightsync.communicator import Group

        if self._group is None:
            self._group = Group()
        store.set(_has(rank), self._group.identity.hex())
        identity = bytes.fromhex(store.get("identity").decode())
        manifest = staging.manifest
        with slot.filling(manifest.label, self._timeout_s) as room:
            with self._group.of(identity, rank, size, slot.ordinal, self._timeout_s) as communicator:
                communicator.relay(room, staging.go_on)
            verify(manifest, room)

    def _room(self, size: int) -> Slot:
        """The slot, made when the first version of this size comes."""
        from weightsync.slot import Slot

        if self._slot is not None and self._slot.size != size:
            self._slot.close(self._timeout_s)
            self._slot = None
        if self._slot is None:
            self._slot = Slot(0, size)
        return self._slot


class Round(rounds.Round):
    """The learner's end: broadcasts what its slot holds, which stays there as long."""

    def __init__(
        self,
        address: str,
        slot: Slot,
        manifest: Manifest,
        holder: Source,
        timeout_s: float,
        group: Group,
        live: Callable[[], int] | None = None,
    ) -> None:
        """As `rounds.Round`; agents can come at once. `group`: that of the rounds before, none of which sends
        any more, for the slot is this version's. Raises `SourceError` if the slot holds another."""
        self._slot, self._group, self._held = slot, group, ExitStack()
        self._held.enter_context(lease(slot.guard.path, manifest.label))
        super().__init__("nccl", address, holder, timeout_s, live)
        self._store.set("card", slot.card)
        self.begin()

    def send(self, store: Store, size: int) -> None:
        """Broadcasts part by part."""
        identity = chosen(store, size, self._group)
        store.set("identity", identity.hex())
        seconds = self.timeout.total_seconds()
        with self._group.of(identity, 0, size, self._slot.ordinal, seconds) as communicator:
            communicator.relay(self._slot.memory, lambda: None)

    def ended(self) -> None:
        """Another version may take the slot."""
        self._held.close()


def chosen(store: Store, size: int, group: Group) -> bytes:
    """The identity of a round's group: that of the one kept, if its members are those of the round."""
    from weightsync.communicator import Communicator

    held = {store.get(_has(rank)).decode() for rank in range(1, size)}
    if group.size == size and held == {group.identity.hex()}:
        return group.identity
    return Communicator.identity()


def _has(rank: int) -> str:
    """Where a rank says which group it has."""
    return f"has:{rank}"


def claim(store: Store, card: str) -> None:
    """Takes a card's place in a round. Raises `SourceError` if another rank of the round has that card."""
    taken = store.get("card").decode() == card
    if taken or store.add(f"card:{card}", 1) > 1:
        who = "the learner" if taken else "another agent"
        raise SourceError(
            f"nccl: GPU {card} is {who}'s as well, and NCCL takes one rank a GPU; it comes by another way"
        )
