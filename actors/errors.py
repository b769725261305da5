"""Errors of the actors. Each says what happened, where, what was got and expected, and what to do."""

from __future__ import annotations


class ActorError(Exception):
    """Base of every error of `actors`."""


class EngineError(ActorError):
    """The engine did not start, died, did not answer in time, or refused a request.

    Except after a start that failed, the engine may be alive in an unknown state: kill it.
    """


class RewardError(ActorError):
    """The reward function cannot be loaded, or failed on an answer."""
