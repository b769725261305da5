"""The actor's side of one limited process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from actors.errors import LoadError, SampleError
from actors.limited.wire import LINE_BYTES, Call, Load, Reply

MARK = "SLIPSTREAM_LIMITED"
"""Environment variable by which a process and all that it started are found again."""
_ROUNDS = 20
_GRACE_S = 1.0
"""Between the two signs of a process's end, its exit and its closed socket."""


class LimitedProcess:
    """A process that runs one handler, call after call.

    Lifecycle: `start`, then `call` one at a time; after a `SampleError` of any cause but `raised`, or
    a call that was cancelled, `end` it. `worn` says that it should be ended as well.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, mark: str, load: Load, wire: socket.socket
    ) -> None:
        """Use `start`."""
        self._process, self._mark, self._load, self._wire = process, mark, load, wire
        self._exited = asyncio.ensure_future(process.wait())
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._calls = 0
        self.worn = False
        """Whether the last call left processes behind or half of the memory limit in use."""

    @classmethod
    async def start(cls, load: Load, start_timeout_s: float) -> LimitedProcess:
        """Start a process and load its handler. Raises `LoadError` with what that raised; nothing is
        left then."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        mark = secrets.token_hex(16)
        variables = {MARK: mark, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "actors.limited.child", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    env=os.environ | variables,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        started = cls(process, mark, load, ours)
        try:
            await started._loaded(start_timeout_s)
        except BaseException:
            await _uncut(started.end())
            raise
        return started

    @property
    def pid(self) -> int:
        """Process id, which is its process group's as well."""
        return self._process.pid

    async def call(self, arguments: list[Any], deadline_s: float) -> Any:
        """What the handler returns for JSON arguments. Raises `SampleError`."""
        self._calls += 1
        reply = await self._ask(msgspec.json.encode(Call(self._calls, arguments)), self._calls, deadline_s)
        self.worn = reply.children or reply.resident_mb > self._load.memory_mb / 2
        if reply.problem == "memory":
            raise SampleError("memory", f"it takes more than {self._load.memory_mb} MiB")
        if reply.problem:
            raise SampleError(reply.problem, reply.message)
        return reply.result

    async def end(self) -> None:
        """Kill the process and everything it started, as far as it can be found."""
        await asyncio.to_thread(end_family, self.pid, self._mark)
        await self._exited
        if self._writer is None:
            self._wire.close()
            return
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._wire, limit=LINE_BYTES)

    async def _loaded(self, timeout_s: float) -> None:
        """Connect, send the load and wait for its reply."""
        await _uncut(self._connect())
        try:
            reply = await self._ask(msgspec.json.encode(self._load), 0, timeout_s)
        except SampleError as error:
            problem = f"{self._load.factory}: the process that loads it failed: {error}; import its module"
            raise LoadError(f"{problem} by hand to see why") from error
        if reply.problem == "memory":
            problem = f"{self._load.factory}: loading it takes more than {self._load.memory_mb} MiB"
            raise LoadError(f"{problem}; raise memory_mb of its limits")
        if reply.problem:
            raise LoadError(reply.message)

    async def _ask(self, line: bytes, number: int, deadline_s: float) -> Reply:
        """The reply to one line."""
        assert self._writer is not None
        self._writer.write(line + b"\n")
        read = asyncio.ensure_future(self._reader.readline())
        try:
            await asyncio.wait([read, self._exited], timeout=deadline_s, return_when="FIRST_COMPLETED")
            if not read.done() and not self._exited.done():
                raise SampleError("deadline", f"no answer within {deadline_s:g} s")
            # A process that ended has closed its socket, unless a child of it still holds that.
            answer = await asyncio.wait_for(read, _GRACE_S)
            if not answer:
                await asyncio.wait([self._exited], timeout=_GRACE_S)
        except (TimeoutError, OSError, ValueError) as error:
            raise SampleError("died", f"its process failed: {error!r}") from error
        finally:
            read.cancel()
        return self._reply(answer, number)

    def _reply(self, answer: bytes, number: int) -> Reply:
        if not answer:
            code = self._process.returncode
            how = "closed its socket" if code is None else f"ended with status {code}"
            if code is not None and code < 0:
                how = f"was ended by {signal.Signals(-code).name}"
            raise SampleError("died", f"its process {how}")
        try:
            reply = msgspec.json.decode(answer, type=Reply)
        except msgspec.MsgspecError as error:
            raise SampleError("died", f"its process answered {answer[:80]!r}: {error}") from error
        if reply.number != number:
            raise SampleError("died", f"its process answered call {reply.number}, expected {number}")
        return reply


def end_family(pid: int, mark: str) -> None:
    """SIGKILL to the process group of `pid`, and to every process whose environment holds the mark.

    A process that both left the group and cleared its environment is not found.
    """
    for _ in range(_ROUNDS):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        found = list(_marked(mark))
        if not found:
            return
        for other in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(other, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Ids of the living processes with the mark in their environment; none without /proc."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


async def _uncut(work: Coroutine[Any, Any, None]) -> None:
    """Awaits what a cancellation must not cut short; it is raised when the work is done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
