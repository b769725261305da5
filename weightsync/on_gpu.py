"""The learner's newest version in the memory of its GPU, if it keeps one there: `weightsync.gpu`.

on_gpu = open_on_gpu(log=print)
manifest = on_gpu.take(manifest, image)     # with the sums that a GPU verifies by
sources = on_gpu.sources(held)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from weightsync.communicator import Group
from weightsync.cuda import driver
from weightsync.errors import NoCuda, SourceError
from weightsync.holder import Held
from weightsync.image import Image
from weightsync.manifest import Manifest
from weightsync.protocol import Source
from weightsync.slot import Slot, fill
from weightsync.transports import cuda_ipc

WAIT_S = 1.0
"""How long a version waits for readers of the one before: one that hangs shall cost its own actor alone."""


class OnGpu:
    """One slot, taken when the first version comes. Lifecycle: any number of `take`, then `close`."""

    def __init__(self, ordinal: int, log: Callable[[str], None]) -> None:
        """On a card that this process sees. Raises `NoCuda`."""
        driver()
        self.slot: Slot | None = None
        """What holds it; None before the first version, and where there is no memory for one."""
        self.group = Group()
        """Of the broadcasts from here."""
        self._ordinal, self._log = ordinal, log
        self._label, self._wait_s = "", WAIT_S

    def take(self, manifest: Manifest, image: Image) -> Manifest:
        """Brings a version to the GPU in place of the one before; its manifest with sums.

        Where that fails, which is said, the version comes by its other ways and has no sums. It waits for
        readers of the one before, but not again for the same ones.
        """
        self._label = ""
        try:
            if self.slot is not None and self.slot.size != manifest.size:
                self._free()
            if self.slot is None:
                self.slot = Slot(self._ordinal, manifest.size)
            summed = fill(self.slot, manifest, image, self._wait_s)
        except (SourceError, RuntimeError) as error:
            self._wait_s = 0.0
            self._log(f"weights: version {manifest.version} is not offered from the GPU: {error}")
            return manifest
        self._label, self._wait_s = manifest.label, WAIT_S
        return summed

    def holds(self, label: str) -> bool:
        """Whether a version is there."""
        return bool(label) and self._label == label

    def sources(self, held: Held) -> list[Source]:
        """How engines of this host get a version, if it is there."""
        if self.slot is None or not self.holds(held.manifest.label):
            return []
        return [cuda_ipc.source_of(self.slot.guard, held.memory)]

    def close(self) -> None:
        """Gives the memory back, and leaves the group."""
        self._free()
        self.group.close()

    def _free(self) -> None:
        if self.slot is not None:
            self.slot.close(WAIT_S)
            self.slot = None


def open_on_gpu(log: Callable[[str], None]) -> OnGpu:
    """On the GPU that this process computes on. Raises `NoCuda` where there is none."""
    try:
        return OnGpu(torch.cuda.current_device() if torch.cuda.is_available() else 0, log)
    except NoCuda as error:
        raise NoCuda(
            f"weightsync.gpu: got true, but the learner has no GPU: {error}; set it to false"
        ) from error
