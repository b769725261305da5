"""A right that is missing, named: which user, which command, which key. Redis says less, 7.0 least of all.

The clients here are redis-py's own, but for what they raise.
"""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.exceptions import NoPermissionError, ResponseError

from buffer.errors import RightMissing

_IN_FUNCTIONS = ("ACL failure", "The user executing the script")
"""How Valkey and Redis begin when a function may not do something."""


def user_of(client: Any) -> str:
    """The user that a client logs in as."""
    for holder in ("connection_pool", "nodes_manager"):  # of a server, of a cluster
        if hasattr(client, holder):
            return getattr(client, holder).connection_kwargs.get("username") or "default"
    return "default"


def missing_right(error: Exception, user: str, command: tuple[Any, ...] = ()) -> RightMissing | None:
    """What a refusal means if it is about rights, else None."""
    if isinstance(error, RightMissing):
        return error
    said = str(error)
    if not isinstance(error, NoPermissionError) and not any(words in said for words in _IN_FUNCTIONS):
        return None
    asked = f" {_shown(command)}" if command else ""
    return RightMissing(
        f"Redis user {user} may not{asked} ({said}), it lacks a right: use the user of the right role, or "
        "renew its rights with `launch redis-users`"
    )


def _shown(command: tuple[Any, ...]) -> str:
    """The command with its key, or its function and the run; never with its data."""
    words = [str(word) for word in command[:4] if isinstance(word, str | int)]
    if words[0].upper().startswith("FCALL"):
        return f"{words[0]} {words[1]} on {words[3]}"
    return " ".join(words[:2])


class _Naming:
    def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return super().execute_command(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            named = missing_right(error, user_of(self), args)
            if named is None:
                raise
            raise named from error


class _AsyncNaming:
    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            named = missing_right(error, user_of(self), args)
            if named is None:
                raise
            raise named from error


class Client(_Naming, redis.Redis):
    """A client of one server."""


class ClusterClient(_Naming, redis.RedisCluster):
    """A client of a cluster."""


class AsyncClient(_AsyncNaming, redis.asyncio.Redis):  # type: ignore[misc]
    """A client of one server, for an event loop."""


class AsyncClusterClient(_AsyncNaming, redis.asyncio.RedisCluster):  # type: ignore[misc]
    """A client of a cluster, for an event loop."""
