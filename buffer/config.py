"""Configuration of the replay stream."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]


class RedisConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Where the stream lives."""

    url: str = ""
    """URL of a running server; empty: `launch demo` and `launch redis` start a private one."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Loopback port of a private server; 0 takes a free one."""
    appendfsync: Literal["always", "everysec"] = "always"
    """How often a private server syncs its file: `always` loses nothing that was acknowledged."""


class StreamConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The stream's rules; all are fixed for the life of a run."""

    groups_per_step: Count = 16
    """B, groups a step trains."""
    group_size: Annotated[int, msgspec.Meta(ge=2)] = 16
    """G, samples of one prompt."""
    max_staleness: Annotated[int, msgspec.Meta(ge=0)] = 2
    """eta: no group is trained more than this many steps after the oldest version that wrote it; 0 is
    synchronous."""
    max_steps: Count = 200
    """Optimizer steps of the run."""
    lease_s: Annotated[float, msgspec.Meta(ge=1)] = 10.0
    """Seconds a lease lives without a heartbeat; actors beat three times as often."""
    attempts: Annotated[int, msgspec.Meta(ge=1, le=99)] = 3
    """Leases of one prompt after which it is retired to the dead letters."""
