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
from redis.exceptions import (
    AuthenticationError,
    ClusterError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
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
    UncommittedVersion,
)
from buffer.rights import AsyncClient, AsyncClusterClient, Client, ClusterClient, missing_right

SOCKET_TIMEOUT_S = 5.0
"""A command that takes longer fails; blocking reads stay well below it."""
LOST = (RedisConnectionError, RedisTimeoutError, OSError, ClusterError, RedisClusterException)
"""No answer: the command may have been carried out or not. A cluster's: a node or its slots are down."""

# The client library's name is not told: no role has the right to, and each try would be logged as a breach.
_OPTIONS: dict[str, Any] = {
    "socket_timeout": SOCKET_TIMEOUT_S,
    "socket_connect_timeout": SOCKET_TIMEOUT_S,
    "driver_info": None,
}


def connect(url: str) -> redis.Redis:
    """A client of `url` whose server answers and is Redis 7.0 / Valkey 8 or newer.

    Raises `RedisUnavailable` (nobody answers there) or `RedisUnsuitable` (password, rights, version).
    """
    client = Client.from_url(_checked(url), retry=Retry(NoBackoff(), 0), **_OPTIONS)
    if not _probed(client, url):
        return client
    client.close()
    try:
        cluster: Any = ClusterClient.from_url(url, retry=Retry(NoBackoff(), 0), **_OPTIONS)
    except (RedisError, RedisClusterException, OSError) as error:
        raise refused(error, shown(url)) or _silent(error, url) from error
    return cluster


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for an event loop. It asks the server once, at once, what `connect` asks."""
    options = {**_OPTIONS, "retry": AsyncRetry(NoBackoff(), 0)}
    probe = Client.from_url(_checked(url), retry=Retry(NoBackoff(), 0), **_OPTIONS)
    clustered = _probed(probe, url)
    probe.close()
    if not clustered:
        return AsyncClient.from_url(url, **options)
    cluster: Any = AsyncClusterClient.from_url(url, **options)
    return cluster


def _probed(client: redis.Redis, url: str) -> bool:
    """Whether the server is in cluster mode; raises if it cannot be used."""
    try:
        info: Any = client.info("server")
        clustered: Any = client.info("cluster")
    except (RedisError, OSError) as error:
        client.close()
        raise refused(error, shown(url)) or _silent(error, url) from error
    version = str(info.get("valkey_version") or info["redis_version"])
    if too_old(info):
        raise RedisUnsuitable(f"Redis at {shown(url)} is {version}; Redis 7.0, Valkey 8 or newer is needed")
    return bool(clustered.get("cluster_enabled") == 1)


def too_old(info: dict[str, Any]) -> bool:
    """Whether a server, by its `INFO server`, is below the floor."""
    version = str(info.get("valkey_version") or info["redis_version"])
    return int(version.split(".")[0]) < (8 if "valkey_version" in info else 7)


def primaries(client: Any) -> list[redis.Redis]:
    """A client of each server that holds keys: the one there is, or a cluster's primaries."""
    if not isinstance(client, redis.RedisCluster):
        return [client]
    nodes = (client.get_redis_connection(node) for node in client.get_primaries())
    return [node for node in nodes if node is not None]


def refused(error: Exception, where: str) -> StreamError | None:
    """What a failed command means if trying again will not help: password, rights, certificate. Else None."""
    said = str(error)
    if (named := missing_right(error, "of the URL")) is not None:
        return named
    if isinstance(error, AuthenticationError) or "WRONGPASS" in said or "NOAUTH" in said:
        return RedisUnsuitable(
            f"Redis at {where} refuses us: {said}; put user:password of a role into the URL"
        )
    if "mismatch, certificate is not valid" in said:
        return RedisUnavailable(
            f"Redis at {where}: {said}; write the host as its certificate does, or issue one for this host"
        )
    if "CERTIFICATE" in said.upper():
        return RedisUnavailable(
            f"Redis at {where}: {said}; name its certificate authority in the URL: ?ssl_ca_certs=FILE"
        )
    if "WRONG_VERSION_NUMBER" in said or "record layer failure" in said:
        return RedisUnavailable(
            f"Redis at {where} does not speak TLS: {said}; write redis:// or its TLS port"
        )
    if isinstance(error, ResponseError) and not isinstance(error, ClusterError):
        return RedisUnsuitable(f"Redis at {where} refuses us: {said}")
    return None


def _silent(error: Exception, url: str) -> RedisUnavailable:
    hint, said = "check the URL and that the server runs", str(error)
    listens = "refused" not in said and "onnect call failed" not in said
    if url.startswith("redis:") and listens:
        hint += "; a server that speaks TLS needs rediss://"
    if url.startswith("rediss:") and "imeout" in said:
        hint += "; a server that does not speak TLS needs redis://"
    return RedisUnavailable(f"no Redis at {shown(url)}: {said}; {hint}")


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
    "SLIPDIGEST": UncommittedVersion,
    "SLIPBEHIND": Behind,
    "SLIPPOSITION": Behind,
    "SLIPNONCE": ForeignRun,
    "SLIPGAP": LostSteps,
    "SLIPRIGHT": RedisUnsuitable,
}


def translate(error: ResponseError, user: str = "") -> StreamError:
    """The error of ours that a server's refusal of a command of `user` means."""
    code, _, message = str(error).partition(" ")
    message = message.partition(" script: ")[0]
    if code in _ERRORS:
        return _ERRORS[code](message)
    if "unction not found" in str(error):
        return NoRun("the server has no function library of this release yet: the learner loads it")
    if (named := missing_right(error, user)) is not None:
        return named
    if any(word in str(error) for word in ("OOM ", "maxmemory", "MISCONF")):
        return RedisFull(f"Redis takes no more for now: {error}")
    return StreamError(message if code.startswith("SLIP") else str(error))
