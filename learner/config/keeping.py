"""What of a run stays on disk."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from learner.config.bounds import Count
from learner.errors import ConfigError


class CheckpointConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What a run that is cut off goes on from, see docs/checkpoints.md."""

    every: Annotated[int, msgspec.Meta(ge=0)] = 10
    """Steps between checkpoints. Redis keeps the payloads of all steps since the oldest of `keep_last`, so
    more steps cost memory there, fewer cost disk. 0: none; a run that is cut off is then over."""
    keep_last: Count = 2
    """Checkpoints to go on from; 2, so that one whose disk fails is not the only one."""
    keep_every: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Checkpoints of versions that are multiples of this are never removed; going back to one that is not
    among `keep_last` takes a new lineage. 0: none."""

    def __post_init__(self) -> None:
        """Refuse an archive that would stay empty."""
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ConfigError(
                f"checkpoint.keep_every: got {self.keep_every} with every = {self.every}, expected a "
                "multiple of it: only checkpoints that are written can be kept"
            )


class WeightsConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which exported versions stay on disk, see docs/evaluation.md."""

    keep: Annotated[int, msgspec.Meta(ge=0)] | Literal["all"] | None = None
    """How many of the newest versions; absent: `stream.max_staleness` + 2. Version 0 and the newest one that
    an evaluation is to have stay besides."""
