"""Configuration of weight sync."""

from __future__ import annotations

from typing import Annotated

import msgspec


class WeightSyncConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How versions reach the engines."""

    address: str = ""
    """Address of the learner that engines connect to; empty: the one this host has towards Redis."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds after which the learner leaves an engine behind that does not take a version."""
