"""Errors of weight sync. Each says what happened, where, what was got and expected, and what to do."""

from __future__ import annotations


class WeightSyncError(Exception):
    """A version did not reach an engine: it is dead, late, or was given tensors it cannot take.

    The group it happened in is of no further use: close it and meet the engine again under a new name.
    """


class ManifestError(WeightSyncError):
    """A manifest is not the one offered, or contradicts itself. Nothing was staged."""


class SourceError(WeightSyncError):
    """A source is gone, late, or gave bytes that are not the version's. Verified chunks stay; try another."""


class Superseded(WeightSyncError):
    """A version under way is too old to be of use: groups it wrote could not be trained any more."""


class NoCuda(WeightSyncError):
    """There is no CUDA where it was asked for: no driver, no card, or no NCCL."""


class Untouched(WeightSyncError):
    """An engine refused a version before it changed anything, and serves the old one entirely."""
