"""Calling the functions of the replay stream, for a role that waits (learner) and one that awaits (actors).

A `Call` is one function of `functions/`: its fields are the arguments, `answer` is its reply. The
functions are idempotent, so a call whose reply was lost is made again, unchanged, until `patience_s`
is over.

    stream = Stream.connect("redis://127.0.0.1:6379", "demo")
    stream.call(Assign(epoch, step=0))      # -> Assigned(status="wait", reason="few", ...)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, ClassVar, Generic, TypeVar, get_args

import msgspec
import redis
import redis.asyncio
from redis.exceptions import ResponseError

from buffer.connect import LOST, connect, connect_async, refused, translate
from buffer.errors import RedisUnavailable, StreamError
from buffer.keys import key, shard_key, shard_of
from buffer.rights import user_of

Reply = TypeVar("Reply")

LIBRARY = "slipstream2"
"""Name of the function library with its major version: clients of an older one live on beside it."""
_FILES = ("header", "core", "groups", "members", "admission", "batches", "versions", "recovery", "snapshot")
_PAUSE_S = 0.2


def library_source() -> str:
    """The function library as it is loaded into Redis."""
    folder = files("buffer").joinpath("functions")
    parts = [folder.joinpath(f"{name}.lua").read_text() for name in _FILES]
    return "\n".join([f"#!lua name={LIBRARY}", *parts])


class Call(msgspec.Struct, Generic[Reply], frozen=True):
    """A function of the library with its arguments, in the order of the fields; a tuple is spread."""

    function: ClassVar[str]
    verb: ClassVar[str] = "FCALL"
    """`FCALL_RO` for a function that only reads, which a role that may only look can call."""

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
        return (self.verb, f"{LIBRARY}_{self.function}", 1, f"{{{run}}}", *self.arguments())


class PublishCall(Call[Reply], frozen=True):
    """A call that goes with a payload. Its `group` says in which shard that lies, its `entry` where."""

    group: str
    """Id of the group, from whose hash the shard follows."""
    entry: str
    """With shards `<shard>/<id>` of the payload, which is written first; else empty: the newest entry."""


class _Run:
    """One run on one server: names of its keys and entries."""

    def __init__(self, run: str, shards: int, patience_s: float) -> None:
        self.run, self.shards, self.patience_s = run, shards, patience_s
        self.lost = 0
        """Calls whose reply was lost, so far: the server may be another one since."""

    def key(self, name: str) -> str:
        """The full name of a key of this run."""
        return key(self.run, name)

    def locate(self, entry: str) -> tuple[str, str]:
        """(key, id) of a payload's entry, as manifests name it: an id, with shards `<shard>/<id>`."""
        shard, _, identity = entry.rpartition("/")
        return (shard_key(self.run, int(shard)) if shard else self.key("stream")), identity

    def _hopeless(self, error: Exception, late: bool) -> StreamError | None:
        """What to raise instead of trying again: a refusal that stays one, or that patience is over."""
        if (final := refused(error, f"run {self.run}")) is not None:
            return final
        return (
            RedisUnavailable(f"Redis did not answer for {self.patience_s:.0f} s: {error}") if late else None
        )


class Stream(_Run):
    """One run on one server, for threads. Safe to share between threads."""

    def __init__(self, client: redis.Redis, run: str, *, patience_s: float = 30.0, shards: int = 0) -> None:
        super().__init__(run, shards, patience_s)
        self.redis = client

    @classmethod
    def connect(cls, url: str, run: str, *, patience_s: float = 30.0, shards: int = 0) -> Stream:
        """Connects and checks the server. Raises `RedisUnavailable` or `RedisUnsuitable`."""
        return cls(connect(url), run, patience_s=patience_s, shards=shards)

    def load_library(self) -> None:
        """Loads the function library, on every primary, replacing an older build of the major version."""
        self.patiently(lambda: self.redis.function_load(library_source(), replace=True))

    def call(self, call: Call[Reply]) -> Reply:
        """Calls a function; see `buffer.errors` for what it raises."""
        return call.answer(self.patiently(lambda: self.redis.execute_command(*call.command(self.run))))

    def publish(self, call: PublishCall[Reply], payload: bytes) -> Reply:
        """Adds a payload to the replay stream and calls `call` with it, in one transaction.

        With shards the payload goes first; should the call refuse it, it is deleted again.
        """
        if self.shards:
            return self._publish_to_shard(call, payload)

        def attempt() -> Any:
            with self.redis.pipeline(transaction=True) as pipe:
                pipe.execute_command("XADD", self.key("stream"), "*", "g", payload)
                pipe.execute_command(*call.command(self.run))
                return _last(pipe.execute(raise_on_error=False))

        return call.answer(self.patiently(attempt))

    def _publish_to_shard(self, call: PublishCall[Reply], payload: bytes) -> Reply:
        shard = shard_of(call.group, self.shards)
        name = shard_key(self.run, shard)
        identity = self.patiently(lambda: self.redis.xadd(name, {"g": payload})).decode()
        reply: Any = self.call(msgspec.structs.replace(call, entry=f"{shard}/{identity}"))
        if reply.entry != f"{shard}/{identity}":
            self.patiently(lambda: self.redis.xdel(name, identity))
        return reply

    def take(self, full_key: str, seconds: float) -> bytes | None:
        """The head of a list, waiting for it; None if none came in time or Redis did not answer."""
        try:
            found: Any = self.redis.blpop([full_key], timeout=seconds)
        except LOST:
            self.lost += 1
            time.sleep(_PAUSE_S)
            return None
        return found[1] if found else None

    def patiently(self, attempt: Callable[[], Any]) -> Any:
        """Makes an attempt, which must be idempotent, until it is answered or patience is over."""
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return attempt()
            except LOST as error:
                self.lost += 1
                if final := self._hopeless(error, time.monotonic() > deadline):
                    raise final from error
                time.sleep(_PAUSE_S)
            except ResponseError as error:
                raise translate(error, user_of(self.redis)) from error

    def close(self) -> None:
        """Closes the connections."""
        self.redis.close()


class AsyncStream(_Run):
    """One run on one server, for an event loop."""

    def __init__(
        self, client: redis.asyncio.Redis, run: str, *, patience_s: float = 30.0, shards: int = 0
    ) -> None:
        super().__init__(run, shards, patience_s)
        self.redis = client

    @classmethod
    def connect(cls, url: str, run: str, *, patience_s: float = 30.0, shards: int = 0) -> AsyncStream:
        """Connects and checks the server. Raises `RedisUnavailable` or `RedisUnsuitable`."""
        return cls(connect_async(url), run, patience_s=patience_s, shards=shards)

    async def call(self, call: Call[Reply]) -> Reply:
        """Calls a function; see `buffer.errors` for what it raises."""
        return call.answer(await self.patiently(lambda: self.redis.execute_command(*call.command(self.run))))

    async def publish(self, call: PublishCall[Reply], payload: bytes) -> Reply:
        """Adds a payload to the replay stream and calls `call` with it, in one transaction.

        With shards the payload goes first; should the call refuse it, it is deleted again.
        """
        if self.shards:
            return await self._publish_to_shard(call, payload)

        async def attempt() -> Any:
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.execute_command("XADD", self.key("stream"), "*", "g", payload)
                pipe.execute_command(*call.command(self.run))
                return _last(await pipe.execute(raise_on_error=False))

        return call.answer(await self.patiently(attempt))

    async def _publish_to_shard(self, call: PublishCall[Reply], payload: bytes) -> Reply:
        shard = shard_of(call.group, self.shards)
        name = shard_key(self.run, shard)
        identity = (await self.patiently(lambda: self.redis.xadd(name, {"g": payload}))).decode()
        reply: Any = await self.call(msgspec.structs.replace(call, entry=f"{shard}/{identity}"))
        if reply.entry != f"{shard}/{identity}":
            await self.patiently(lambda: self.redis.xdel(name, identity))
        return reply

    async def take(self, full_key: str, seconds: float) -> bytes | None:
        """The head of a list, waiting for it; None if none came in time or Redis did not answer."""
        raise_if_cancelled()
        try:
            found: Any = await self.redis.blpop([full_key], timeout=seconds)
        except LOST:
            raise_if_cancelled()
            self.lost += 1
            await asyncio.sleep(_PAUSE_S)
            return None
        return found[1] if found else None

    async def patiently(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Makes an attempt, which must be idempotent, until it is answered or patience is over."""
        raise_if_cancelled()
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return await attempt()
            except LOST as error:
                raise_if_cancelled()
                self.lost += 1
                if final := self._hopeless(error, time.monotonic() > deadline):
                    raise final from error
                await asyncio.sleep(_PAUSE_S)
            except ResponseError as error:
                raise translate(error, user_of(self.redis)) from error

    async def close(self) -> None:
        """Closes the connections."""
        await self.redis.aclose()


def raise_if_cancelled() -> None:
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
