"""What can go wrong in the learner, as types a caller can tell apart."""

from __future__ import annotations


class LearnerError(Exception):
    """Base of every error the learner raises on purpose."""


class ConfigError(LearnerError, ValueError):
    """A config value, or a combination of values, that has no meaning.

    It is a `ValueError` so that msgspec, when it decodes a config file, adds the path of the field.
    """


class ModelError(LearnerError):
    """A checkpoint folder whose architecture or tensors the learner cannot train exactly."""


class BatchError(LearnerError):
    """A batch that cannot be trained: wrong step, no groups, or a group too small for its statistics."""


class DataError(LearnerError):
    """A data set that cannot be asked: a missing file, a line that is not an example, no short prompt."""


class CheckpointError(LearnerError):
    """A checkpoint that cannot be written, read, or gone on from."""


class Aborted(LearnerError):
    """A run that a threshold of `objective.abort` ended; the message says what to change."""
