"""Clients of a Redis URL, and what its server's refusals mean.

`redis://`, `rediss://` (TLS; `?ssl_ca_certs=FILE` names the authority) and `unix://` are understood. A
server in cluster mode is recognised and gets a cluster client. redis-py's own retries are off: they
would repeat plain writes, too.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from buffer.errors import (
    Behind,
    Fenced,
    ForeignRun,
    LostSteps,
    NoRun,
    RedisFull,
    RedisUnavailable,
    RedisUnsuitable,
    SchemaMismatch,
    SettingsMismatch,
    StreamError,
)

SOCKET_TIMEOUT_S = 5.0
"""A command that takes longer fails; blocking reads stay well below it."""
LOST = (RedisConnectionError, RedisTimeoutError, OSError)
"""No answer: the command may have been carried out or not."""

_OPTIONS: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S}


def connect(url: str) -> redis.Redis:
    """A client of `url` whose server answers and is Redis 7.0 / Valkey 8 or newer.

    Raises `RedisUnavailable` (nobody answers there) or `RedisUnsuitable` (password, rights, version).
    """
    client = redis.Redis.from_url(_checked(url), retry=Retry(NoBackoff(), 0), **_OPTIONS)
    try:
        info = client.info("server")
        clustered = client.info("cluster").get("cluster_enabled") == 1
    except (AuthenticationError, NoPermissionError, ResponseError) as error:
        raise RedisUnsuitable(
            f"Redis at {shown(url)} refuses us: {error}; put user:password of a role into the URL"
        ) from error
    except (RedisError, OSError) as error:
        hint = "check the URL and that the server runs"
        if "CERTIFICATE" in str(error).upper():
            hint = "name its certificate authority in the URL: ?ssl_ca_certs=FILE"
        raise RedisUnavailable(f"no Redis at {shown(url)}: {error}; {hint}") from error
    version = str(info.get("valkey_version") or info["redis_version"])
    floor = 8 if "valkey_version" in info else 7
    if int(version.split(".")[0]) < floor:
        raise RedisUnsuitable(f"Redis at {shown(url)} is {version}; Redis 7.0, Valkey 8 or newer is needed")
    if not clustered:
        return client
    client.close()
    cluster: Any = redis.RedisCluster.from_url(url, retry=Retry(NoBackoff(), 0), **_OPTIONS)
    return cluster


def connect_async(url: str, *, cluster: bool = False) -> redis.asyncio.Redis:
    """A client of `url` for an event loop; the first command connects."""
    options = {**_OPTIONS, "retry": AsyncRetry(NoBackoff(), 0)}
    if not cluster:
        return redis.asyncio.Redis.from_url(_checked(url), **options)
    clustered: Any = redis.asyncio.RedisCluster.from_url(_checked(url), **options)
    return clustered


def shown(url: str) -> str:
    """The URL without its password, fit for logs."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


def _checked(url: str) -> str:
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise RedisUnavailable(f"Redis URL: got {url!r}, expected redis://, rediss:// or unix://")
    return url


_ERRORS: dict[str, type[StreamError]] = {
    "SLIPFENCED": Fenced,
    "SLIPNORUN": NoRun,
    "SLIPSETTINGS": SettingsMismatch,
    "SLIPSCHEMA": SchemaMismatch,
    "SLIPBEHIND": Behind,
    "SLIPPOSITION": Behind,
    "SLIPNONCE": ForeignRun,
    "SLIPGAP": LostSteps,
}


def translate(error: ResponseError) -> StreamError:
    """The error of ours that a server's refusal means."""
    code, _, message = str(error).partition(" ")
    message = message.partition(" script: ")[0]
    if code in _ERRORS:
        return _ERRORS[code](message)
    if "unction not found" in str(error):
        return NoRun("the server has no function library of this release yet: the learner loads it")
    if isinstance(error, NoPermissionError) or "NOPERM" in str(error) or "ACL failure" in str(error):
        return RedisUnsuitable(
            f"the Redis user lacks a right: {error}; give it its role with `launch redis-users`"
        )
    if any(word in str(error) for word in ("OOM ", "maxmemory", "MISCONF")):
        return RedisFull(f"Redis takes no more for now: {error}")
    return StreamError(message if code.startswith("SLIP") else str(error))
