"""Configuration of weight sync."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

WAYS = ("cuda_ipc", "shm", "delta", "peer", "disk")
"""The transports that an agent pulls by, the cheapest first."""
ON_GPU = ("cuda_ipc", "nccl")
"""Those that need CUDA, and the version in the memory of the learner's GPU."""
_NEEDS = {"disk": "folder", "delta": "delta", "cuda_ipc": "gpu", "nccl": "gpu"}
"""What the learner must offer for a transport, as a field here."""


class WeightSyncConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How versions reach the engines."""

    address: str = ""
    """Address of the learner that engines connect to; empty: the one this host has towards Redis."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds after which the learner names an actor that does not take a version and leaves it behind; also
    those of one operation of gloo."""
    transport: Literal["auto", "cuda_ipc", "nccl", "shm", "delta", "peer", "disk", "gloo", "stock"] = "auto"
    """How bytes travel. `auto`: on the learner's host from its GPU where that is offered, else shared memory;
    elsewhere what changed where that is offered, else a pull from the learner or any agent. `nccl`, `gloo`:
    one broadcast to all agents that are ready, from GPU to GPU or between hosts without. `stock`: SGLang's
    own update over gloo."""
    gpu: bool = False
    """Also keep the newest version in the memory of the learner's GPU, for `cuda_ipc` and `nccl`."""
    folder: str = ""
    """A folder that learner and actors share; if named, each version is also written there."""
    delta: bool = False
    """Also offer what changed since the version before, which costs the learner's CPU."""
    check: bool = True
    """Compare every element in the engine with what was staged, before the engine goes on."""

    def __post_init__(self) -> None:
        """Refuse a transport without what it needs, and what no transport uses. Raises `ValueError`; msgspec
        adds the path."""
        needed = _NEEDS.get(self.transport, "")
        if needed and not getattr(self, needed):
            value = "to a shared folder" if needed == "folder" else "= true"
            raise ValueError(
                f'transport: got "{self.transport}" without {needed}; set weightsync.{needed} {value}'
            )
        for field in {*_NEEDS.values()} - {needed} if self.transport != "auto" else ():
            if getattr(self, field):
                raise ValueError(
                    f'{field}: set beside transport "{self.transport}", which does not use it; leave it out, '
                    'or set transport = "auto"'
                )
