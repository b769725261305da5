"""Errors of the replay stream. Each says what happened, where, what was got and expected, and what to do."""

from __future__ import annotations


class StreamError(Exception):
    """Base of every error of `buffer`; raised itself when a function refuses its arguments."""


class RedisUnavailable(StreamError):
    """No answer from the Redis server within the time allowed, or it refuses the connection."""


class RedisUnsuitable(StreamError):
    """The server answers but cannot be used: too old, wrong password, missing right, no library."""


class NoRun(StreamError):
    """The server knows no such run (yet)."""


class Fenced(StreamError):
    """The caller's epoch was replaced: another process has taken its place, so it must stop writing."""


class SettingsMismatch(StreamError):
    """The run exists with other settings; changing them needs another run name."""


class RecordError(StreamError):
    """A record that cannot be decoded.

    `entry` is the stream entry id, `group` the group id, `field` the part of the record that is
    wrong; each is `"?"` where it could not be known.
    """

    def __init__(self, problem: str, *, field: str, entry: str = "?", group: str = "?") -> None:
        super().__init__(f"record of group {group} at entry {entry}: {field}: {problem}")
        self.problem, self.field, self.entry, self.group = problem, field, entry, group
