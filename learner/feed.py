"""Keeps the prompt queue ahead of the actors, independently of the steps."""

from __future__ import annotations

import threading
from types import TracebackType

from buffer.client import Stream
from buffer.errors import StreamError
from buffer.prompts import Feed, encode_prompt
from learner.datasets import PromptOrder

_LOOK_S = 0.25


class Feeder(threading.Thread):
    """A thread that holds `ahead` prompts in the queue while it is entered.

    The queue's tail in Redis says which prompt comes next, so a feeder can be stopped anywhere.
    What ends it early is kept in `error`.
    """

    def __init__(self, stream: Stream, epoch: str, order: PromptOrder, *, tail: int, ahead: int) -> None:
        super().__init__(name="feeder", daemon=True)
        self._stream, self._epoch, self._order = stream, epoch, order
        self._tail, self._ahead = tail, ahead
        self._stopped = threading.Event()
        self.error: StreamError | None = None

    def run(self) -> None:
        """Tops the queue up whenever it is shorter than `ahead`."""
        try:
            while not self._stopped.is_set():
                self._top_up()
                self._stopped.wait(_LOOK_S)
        except StreamError as error:
            self.error = error

    def _top_up(self) -> None:
        queued = int(self._stream.redis.llen(self._stream.key("prompts")))
        missing = self._ahead - queued
        if missing > 0:
            prompts = (self._order.at(self._tail + index) for index in range(missing))
            fed = self._stream.call(Feed(self._epoch, self._tail, tuple(map(encode_prompt, prompts))))
            self._tail = fed.tail

    def __enter__(self) -> Feeder:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self.join()
