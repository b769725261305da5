"""Configuration of weight sync."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

WAYS = ("shm", "delta", "peer", "disk")
"""The transports that an agent pulls by, the cheapest first."""


class WeightSyncConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How versions reach the engines."""

    address: str = ""
    """Address of the learner that engines connect to; empty: the one this host has towards Redis."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds after which the learner names an actor that does not take a version and leaves it behind; also
    those of one operation of gloo."""
    transport: Literal["auto", "shm", "delta", "peer", "disk", "gloo", "stock"] = "auto"
    """How bytes travel. `auto`: shared memory on the learner's host, elsewhere what changed where that is
    offered, else a pull from the learner or any agent. `gloo`: one broadcast to all agents that are ready.
    `stock`: SGLang's own update over gloo."""
    folder: str = ""
    """A folder that learner and actors share; if named, each version is also written there."""
    delta: bool = False
    """Also offer what changed since the version before, which costs the learner's CPU."""
    check: bool = True
    """Compare every element in the engine with what was staged, before the engine goes on."""

    def __post_init__(self) -> None:
        """Refuse a transport without what it needs. Raises `ValueError`; msgspec adds the path."""
        if self.transport == "disk" and not self.folder:
            raise ValueError('transport: got "disk" without a folder; set weightsync.folder to a shared one')
        if self.transport == "delta" and not self.delta:
            raise ValueError('transport: got "delta", which is not offered; set weightsync.delta = true')
