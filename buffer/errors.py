"""Errors of the replay stream. Each says what happened, where, what was got and expected, and what to do."""

from __future__ import annotations

from redis.exceptions import NoPermissionError


class StreamError(Exception):
    """Base of every error of `buffer`; raised itself when a function refuses its arguments."""


class RedisUnavailable(StreamError):
    """No answer from the Redis server within the time allowed, or it refuses the connection."""


class RedisUnsuitable(StreamError):
    """The server answers but cannot be used: too old, wrong password, missing right, no library."""


class RightMissing(RedisUnsuitable, NoPermissionError):
    """The Redis user may not do what was asked: it has another role, or none on this run.

    A `redis.NoPermissionError`, too, for those who handle whatever a plain command raises.
    """


class RedisFull(StreamError):
    """The server takes no payload for now: over `maxmemory`, or its disk is full. Back off, try again."""


class NoRun(StreamError):
    """The server knows no such run (yet)."""


class ForeignRun(StreamError):
    """The server was wiped or swapped: it holds another run than this process belongs to, which must stop."""


class Fenced(StreamError):
    """The caller's epoch is not the one that may write: another process has taken its place, so it must stop.

    Or the server came back older than the caller's join, which `came_back_older` tells: then it joins again.
    """

    @property
    def came_back_older(self) -> bool:
        """Whether the server knows only a lower epoch than the caller's.

        >>> Fenced("actor:a: epoch 3:9c is not the one that may write, 2:41").came_back_older
        True
        >>> Fenced("actor:a: epoch 3:9c is not the one that may write, 4:41").came_back_older
        False
        """
        own, _, current = str(self).rpartition(" is not the one that may write, ")
        return _number(current) < _number(own.rpartition(" ")[2])


class UncommittedVersion(StreamError):
    """Weights that were never committed, or not with this digest, as far as the server knows."""


class Behind(StreamError):
    """The server is behind the learner: it came back older, and must be reconciled before anything else."""


class LostSteps(StreamError):
    """The server came back so much older that the learner no longer knows what happened since."""


class SettingsMismatch(StreamError):
    """The run exists with other settings; only a fork changes them."""


class SchemaMismatch(StreamError):
    """Actor and learner are of releases that do not read each other's records."""


class RecordError(StreamError):
    """A record that cannot be decoded.

    `entry` is the stream entry id, `group` the group id, `field` the part of the record that is
    wrong; each is `"?"` where it could not be known.
    """

    def __init__(self, problem: str, *, field: str, entry: str = "?", group: str = "?") -> None:
        super().__init__(f"record of group {group} at entry {entry}: {field}: {problem}")
        self.problem, self.field, self.entry, self.group = problem, field, entry, group


def _number(epoch: str) -> int:
    digits = epoch.partition(":")[0]
    return int(digits) if digits.isdigit() else 0
