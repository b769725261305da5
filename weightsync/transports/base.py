"""What a transport is: one way for the bytes of a version to come to an agent."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from weightsync.protocol import Source
from weightsync.staging import Staging


class Transport(Protocol):
    """The agent's side of a medium. Called in a thread; every call ends within the transport's timeout."""

    kind: str
    """Kind of the sources it can read."""

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        """Whether a source can be read from here; `staging` is None before the manifest is known."""
        ...

    def manifest(self, source: Source, version: str) -> bytes:
        """The manifest of a version (`Offer.label`) as it travels. Raises `SourceError`."""
        ...

    def fetch(self, source: Source, version: str, staging: Staging) -> None:
        """Brings every missing chunk. Raises `SourceError`; what was kept until then stays.

        `Superseded`, which the staging raises, passes through.
        """
        ...


def this_host() -> str:
    """What processes that can open each other's images agree on: this boot, this set of process ids.

    Containers that do not see each other's processes are different hosts.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
