"""Figures shown in `{run}:progress` by a thread, so that no step waits for Redis to store them.

with Board(stream) as board:
    board.show({"step": 3, "loss": 0.1})    # returns at once
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import redis

from buffer.client import Stream


class Board(threading.Thread):
    """Shows the newest of what it is given; a Redis that is away costs only the display.

    Lifecycle: it lives while it is entered, and shows what was given last before it ends.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__(name="board", daemon=True)
        self._stream = stream
        self._figures: dict[str, Any] = {}
        self._given, self._ended = threading.Condition(), False

    def show(self, figures: dict[str, Any]) -> None:
        """Shows figures by name, soon; of one name only the newest may be seen."""
        with self._given:
            self._figures |= figures
            self._given.notify()

    def run(self) -> None:
        """Shows until the end."""
        while figures := self._next():
            try:
                self._stream.redis.hset(self._stream.key("progress"), mapping=figures)
            except redis.RedisError:
                continue

    def _next(self) -> dict[str, Any]:
        """The figures given since the last time, waiting for some; none at the end."""
        with self._given:
            self._given.wait_for(lambda: self._figures or self._ended)
            figures, self._figures = self._figures, {}
            return figures

    def __enter__(self) -> Board:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._given:
            self._ended = True
            self._given.notify()
        self.join()
