"""Errors of weight sync."""

from __future__ import annotations


class WeightSyncError(Exception):
    """A version did not reach an engine: it is dead, late, or was given tensors it cannot take.

    The group it happened in is of no further use: close it and meet the engine again under a new name.
    """
