"""Configuration of the replay stream."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]


class RedisConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Where the stream lives."""

    url: str = ""
    """URL of the server for `launch learner`, where no option names one; `launch demo` starts its own."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Loopback port of a private server; 0 takes a free one."""
    appendfsync: Literal["always", "everysec"] = "always"
    """How often a private server syncs its file: `always` loses nothing that was acknowledged."""


class StreamConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The stream's rules; all are fixed for the life of a lineage."""

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
    late: Literal["wait", "drop"] = "wait"
    """What is done about a group that holds its step up: `wait` for it, which wastes and biases nothing, or
    `drop` it and generate its prompt again later, which favours short answers."""
    oversample: Annotated[float, msgspec.Meta(ge=1, le=8)] = 1.0
    """Groups admitted a step, as a multiple of those trained; what is over when it is due is dropped as
    `surplus`. Above 1 only with `late = "drop"`."""
    lease_max_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds after which a lease ends even if it is renewed; 0: ten times the p99 of group times, and at
    least six times `lease_s`."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, which teach nothing, as `filtered`, and admit others."""
    uncovered_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Steps that may be assigned beyond the last checkpoint; then a checkpoint comes first. 0: no bound."""
    payload_mib: Annotated[int, msgspec.Meta(ge=0)] = 0
    """MiB of payloads, stored and expected, up to which leases are granted; keep it below three quarters of
    the server's `maxmemory`. 0: no bound."""
    shards: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Payload streams over the nodes of a Redis Cluster; 0: one, beside the run's other keys."""

    def __post_init__(self) -> None:
        """Refuse over-sampling that nothing would drop. Raises `ValueError`; msgspec adds the path."""
        if self.oversample > 1 and self.late != "drop":
            raise ValueError(
                f'oversample: got {self.oversample} with late = "{self.late}", which drops no surplus; set '
                'late = "drop", or oversample = 1'
            )
