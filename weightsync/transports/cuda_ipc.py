"""GPU memory of one host: the engine copies from the learner's GPU, by CUDA IPC, and nothing is staged.

The agent only looks whether the version is there and its engine can see the card; it touches no GPU itself.
The engine's loader holds the slot, verifies every chunk where it lies, and copies (`weightsync.slot`). A
newer version takes the slot's place when nobody reads it; who then still wants the older one is told so.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightsync.errors import SourceError
from weightsync.guard import Guard, Place, lease
from weightsync.image import Image
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.base import this_host
from weightsync.transports.shm import manifest_beside


class CudaIpc:
    """Finds the learner's slot.

    The source's address is the path of the slot's guard and that of the manifest, separated by a space.
    """

    kind = "cuda_ipc"

    def __init__(self, cards: Sequence[str]) -> None:
        """`cards`: the GPUs that this process sees, and with it its engine."""
        self._cards, self._host = cards, this_host()

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """On the same host, while nothing of the version is here yet."""
        return source.host == self._host and (staging is None or staging.is_empty)

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest, from a memory file of the learner's."""
        return manifest_beside(source)

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Leaves the version where it is, for the engine."""
        guard = source.address.partition(" ")[0]
        with lease(guard, version) as held:
            card = held.contents.card
        if card not in self._cards:
            raise SourceError(
                f"cuda_ipc: version {version} is on GPU {card}, this process sees {', '.join(self._cards)}; "
                "CUDA_VISIBLE_DEVICES of the actor must name the learner's, too"
            )
        staging.put(Place(guard))


def source_of(guard: Guard, manifest: Image) -> Source:
    """The source of a slot of this process, and of its manifest in a memory file."""
    return Source("cuda_ipc", this_host(), f"{guard.path} {manifest.path}")
