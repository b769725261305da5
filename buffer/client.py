"""Connections to the replay stream, for a role that waits (learner) and one that awaits (actors).

A `Call` is one function of `functions.lua`: its fields are the arguments, `answer` is its reply. The
functions are idempotent, so a call whose reply was lost is made again, unchanged, until `patience_s`
is over. redis-py's own retries are off: they would repeat plain writes, too.

    stream = Stream.connect("redis://127.0.0.1:6379", "demo")
    stream.call(Assign(epoch, step=0))      # -> Assigned(status="wait", reason="few", ...)
"""

from __future__ import annotations

import asyncio
import time
from importlib.resources import files
from typing import Any, ClassVar, Generic, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from buffer.errors import Fenced, NoRun, RedisUnavailable, RedisUnsuitable, SettingsMismatch, StreamError
from buffer.keys import key

Reply = TypeVar("Reply")

SOCKET_TIMEOUT_S = 5.0
"""A command that takes longer fails; blocking reads stay well below it."""
_PAUSE_S = 0.2
_LOST = (RedisConnectionError, RedisTimeoutError, OSError)


class Call(msgspec.Struct, Generic[Reply], frozen=True):
    """A function of the library with its arguments, in the order of the fields; a tuple is spread."""

    function: ClassVar[str]

    def arguments(self) -> list[Any]:
        """The function's ARGV."""
        flat: list[Any] = []
        for value in msgspec.structs.astuple(self):
            flat.extend(value) if isinstance(value, tuple) else flat.append(value)
        return flat

    @classmethod
    def answer(cls, raw: Any) -> Reply:
        """The reply as its struct."""
        return msgspec.msgpack.decode(raw, type=get_args(cls.__orig_bases__[0])[0])  # type: ignore[attr-defined]

    def command(self, run: str) -> tuple[Any, ...]:
        """The FCALL command."""
        return ("FCALL", f"slipstream1_{self.function}", 1, f"{{{run}}}", *self.arguments())


class PublishCall(Call[Reply], frozen=True):
    """A call that goes with a payload: XADD and the function in one transaction."""


class Stream:
    """One run on one server, for threads. Safe to share between threads."""

    def __init__(self, client: redis.Redis, run: str, *, patience_s: float = 30.0) -> None:
        self.redis, self.run, self.patience_s = client, run, patience_s

    @classmethod
    def connect(cls, url: str, run: str, *, patience_s: float = 30.0) -> Stream:
        """Connects and checks the server. Raises `RedisUnavailable` or `RedisUnsuitable`."""
        return cls(connect(url), run, patience_s=patience_s)

    def key(self, name: str) -> str:
        """The full name of a key of this run."""
        return key(self.run, name)

    def load_library(self) -> None:
        """Loads the function library, replacing an older build of the same major version."""
        source = files("buffer").joinpath("functions.lua").read_text()
        self.redis.function_load(source, replace=True)

    def call(self, call: Call[Reply]) -> Reply:
        """Calls a function; see `buffer.errors` for what it raises."""
        return call.answer(self._patiently(lambda: self.redis.execute_command(*call.command(self.run))))

    def publish(self, call: PublishCall[Reply], payload: bytes) -> Reply:
        """Adds a payload to the replay stream and calls `call` with it, in one transaction."""

        def attempt() -> Any:
            with self.redis.pipeline(transaction=True) as pipe:
                pipe.execute_command("XADD", self.key("stream"), "*", "g", payload)
                pipe.execute_command(*call.command(self.run))
                return _last(pipe.execute(raise_on_error=False))

        return call.answer(self._patiently(attempt))

    def take(self, full_key: str, seconds: float) -> bytes | None:
        """The head of a list, waiting for it; None if none came in time or Redis did not answer."""
        try:
            found: Any = self.redis.blpop([full_key], timeout=seconds)
        except _LOST:
            time.sleep(_PAUSE_S)
            return None
        return found[1] if found else None

    def _patiently(self, attempt: Any) -> Any:
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return attempt()
            except _LOST as error:
                if time.monotonic() > deadline:
                    raise RedisUnavailable(_silent(self.patience_s, error)) from error
                time.sleep(_PAUSE_S)
            except ResponseError as error:
                raise _translate(error) from error

    def close(self) -> None:
        """Closes the connections."""
        self.redis.close()


class AsyncStream:
    """One run on one server, for an event loop."""

    def __init__(self, client: redis.asyncio.Redis, run: str, *, patience_s: float = 30.0) -> None:
        self.redis, self.run, self.patience_s = client, run, patience_s

    @classmethod
    def connect(cls, url: str, run: str, *, patience_s: float = 30.0) -> AsyncStream:
        """A client of `url`; the first call connects."""
        options = {**_OPTIONS, "retry": AsyncRetry(NoBackoff(), 0)}
        return cls(redis.asyncio.Redis.from_url(_checked(url), **options), run, patience_s=patience_s)

    def key(self, name: str) -> str:
        """The full name of a key of this run."""
        return key(self.run, name)

    async def call(self, call: Call[Reply]) -> Reply:
        """Calls a function; see `buffer.errors` for what it raises."""
        return call.answer(await self._patiently(lambda: self.redis.execute_command(*call.command(self.run))))

    async def publish(self, call: PublishCall[Reply], payload: bytes) -> Reply:
        """Adds a payload to the replay stream and calls `call` with it, in one transaction."""

        async def attempt() -> Any:
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.execute_command("XADD", self.key("stream"), "*", "g", payload)
                pipe.execute_command(*call.command(self.run))
                return _last(await pipe.execute(raise_on_error=False))

        return call.answer(await self._patiently(attempt))

    async def take(self, full_key: str, seconds: float) -> bytes | None:
        """The head of a list, waiting for it; None if none came in time or Redis did not answer."""
        _raise_if_cancelled()
        try:
            found: Any = await self.redis.blpop([full_key], timeout=seconds)
        except _LOST:
            _raise_if_cancelled()
            await asyncio.sleep(_PAUSE_S)
            return None
        return found[1] if found else None

    async def _patiently(self, attempt: Any) -> Any:
        _raise_if_cancelled()
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return await attempt()
            except _LOST as error:
                _raise_if_cancelled()
                if time.monotonic() > deadline:
                    raise RedisUnavailable(_silent(self.patience_s, error)) from error
                await asyncio.sleep(_PAUSE_S)
            except ResponseError as error:
                raise _translate(error) from error

    async def close(self) -> None:
        """Closes the connections."""
        await self.redis.aclose()


_OPTIONS: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S}


def connect(url: str) -> redis.Redis:
    """A client of `url` whose server answers and is Redis 7.0 / Valkey 8 or newer.

    Raises `RedisUnavailable` (nobody answers there) or `RedisUnsuitable` (password, rights, version).
    """
    client = redis.Redis.from_url(_checked(url), retry=Retry(NoBackoff(), 0), **_OPTIONS)
    try:
        info = client.info("server")
    except (AuthenticationError, NoPermissionError, ResponseError) as error:
        raise RedisUnsuitable(
            f"Redis at {shown(url)} refuses us: {error}; put user:password in the URL"
        ) from error
    except (RedisError, OSError) as error:
        problem = f"no Redis at {shown(url)}: {error}; check the URL and that the server runs"
        raise RedisUnavailable(problem) from error
    version = str(info.get("valkey_version") or info["redis_version"])
    floor = 8 if "valkey_version" in info else 7
    if int(version.split(".")[0]) < floor:
        raise RedisUnsuitable(f"Redis at {shown(url)} is {version}; Redis 7.0, Valkey 8 or newer is needed")
    return client


def shown(url: str) -> str:
    """The URL without its password, fit for logs."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


def _checked(url: str) -> str:
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise RedisUnavailable(f"Redis URL: got {url!r}, expected redis://, rediss:// or unix://")
    return url


def _raise_if_cancelled() -> None:
    """Ends a cancelled task here: redis-py 8.1 can swallow a cancellation, or call it a lost connection.

    (It looks for unread data under `asyncio.timeout(0)`, which takes a cancellation for its own.)
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _last(results: list[Any]) -> Any:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results[-1]


def _silent(patience_s: float, error: Exception) -> str:
    return f"Redis did not answer for {patience_s:.0f} s: {error}"


_ERRORS = {"SLIPFENCED": Fenced, "SLIPNORUN": NoRun, "SLIPSETTINGS": SettingsMismatch}


def _translate(error: ResponseError) -> StreamError:
    code, _, message = str(error).partition(" ")
    message = message.partition(" script: ")[0]
    if code in _ERRORS:
        return _ERRORS[code](message)
    if "unction not found" in str(error):
        return NoRun("the server has no function library of this release yet: the learner loads it")
    if isinstance(error, NoPermissionError):
        return RedisUnsuitable(f"the Redis user lacks a right: {error}")
    return StreamError(message if code.startswith("SLIP") else str(error))
