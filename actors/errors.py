"""Errors of the actors. Each says what happened, where, what was got and expected, and what to do."""

from __future__ import annotations

from typing import Literal

Cause = Literal["deadline", "died", "memory", "raised", "environment"]
"""Why a sample is invalid: its function ran past the deadline, ended its process, ran out of memory,
raised or returned no reward, or its environment failed."""


class ActorError(Exception):
    """Base of every error of `actors`."""


class EngineError(ActorError):
    """The engine did not start, died, did not answer in time, or refused a request.

    Except after a start that failed, the engine may be alive in an unknown state: kill it.
    """


class LoadError(ActorError):
    """What the configuration names as `module:name` cannot be loaded or started: nothing will work."""


class RewardError(ActorError):
    """Too few samples of a group could be scored, or a gold answer is none."""


class ToolError(ActorError):
    """A tool was called with what it cannot work on; the policy is told."""


class SampleError(ActorError):
    """A sample cannot be scored, for a reason that says nothing of the sample: it is invalid, not wrong."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause: Cause = cause
        """Why, in one word; what is counted."""
