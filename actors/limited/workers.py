"""A few limited processes that take calls in turn, and are replaced when they fail."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from actors.config import LimitsConfig
from actors.errors import SampleError
from actors.limited.process import LimitedProcess
from actors.limited.wire import Load


class Workers:
    """`limits.workers` processes with the same handler, each started when it is first needed.

    Worked example::

        async with Workers("mine.functions:make_handler", ["an", "argument"], LimitsConfig()) as workers:
            result = await workers.call("text", "answer")

    A call that fails costs that call alone: its process is killed with all it started, and the next
    call starts another.
    """

    def __init__(self, factory: str, arguments: list[Any], limits: LimitsConfig) -> None:
        self._load, self._limits = Load(factory, arguments, limits.memory_mb), limits
        self._free: asyncio.Queue[LimitedProcess | None] = asyncio.Queue()
        for _ in range(limits.workers):
            self._free.put_nowait(None)
        self._ending: set[asyncio.Task[None]] = set()
        self.restarts = 0
        """Processes that were ended before the end."""

    async def call(self, *arguments: Any) -> Any:
        """What the handler returns for JSON arguments, waiting for a free process first.

        Raises `SampleError` if this call failed, `LoadError` if no process can be started.
        """
        process = await self._free.get()
        clean = False
        try:
            process = process or await LimitedProcess.start(self._load, self._limits.start_timeout_s)
            result = await process.call(list(arguments), self._limits.deadline_s)
            clean = not process.worn
        except SampleError as error:
            clean = error.cause == "raised" and process is not None and not process.worn
            raise
        finally:
            if process is not None and not clean:
                self._end(process)
                self.restarts += 1
                process = None
            self._free.put_nowait(process)
        return result

    async def close(self) -> None:
        """Ends every process, once calls under way have given theirs back; cancelled ones, too."""
        for process in [await self._free.get() for _ in range(self._limits.workers)]:
            if process is not None:
                self._end(process)
            self._free.put_nowait(None)
        await asyncio.gather(*self._ending)

    def _end(self, process: LimitedProcess) -> None:
        """Ends a process while the caller goes on."""
        task = asyncio.create_task(process.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def __aenter__(self) -> Workers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
