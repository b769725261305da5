"""Keeps the prompt queue ahead of the actors and the run's clock going, independently of the steps."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from buffer.errors import Behind, StreamError
from buffer.prompts import encode_prompt
from buffer.session import Session
from buffer.stream import sweep
from learner.curriculum import Curriculum
from learner.datasets import PromptOrder
from learner.errors import LearnerError

_LOOK_S = 0.25
_SWEEP_S = 30.0


class Feeder(threading.Thread):
    """A thread that holds `ahead` prompts in the queue while it is entered.

    The queue's tail in Redis says which prompt comes next, so a feeder can be stopped anywhere; when the
    data ends it says so. Each look also lets the run's clock advance, and now and then payloads that
    nothing refers to are swept. What ends it early, `check` raises.
    """

    def __init__(self, session: Session, order: PromptOrder | Curriculum, *, ahead: int) -> None:
        super().__init__(name="feeder", daemon=True)
        self._session, self._order, self._ahead = session, order, ahead
        self._stopped = threading.Event()
        self._swept = time.monotonic()
        self._error: StreamError | None = None

    def check(self) -> None:
        """Raises what ended it, which would otherwise leave the learner waiting for ever."""
        if self._error is not None:
            raise self._error
        if not self.is_alive():
            raise LearnerError("the thread that feeds prompts has died; see above why")

    def run(self) -> None:
        """Tops the queue up whenever it is shorter than `ahead`."""
        try:
            while not self._stopped.is_set():
                self._session.beat()
                self._top_up()
                self._sweep()
                self._stopped.wait(_LOOK_S)
        except StreamError as error:
            self._error = error

    def _top_up(self) -> None:
        stream = self._session.stream
        queued = int(stream.patiently(lambda: stream.redis.llen(stream.key("prompts"))))
        if queued >= self._ahead or self._session.data_end >= 0:
            return
        positions = range(self._session.tail, self._session.tail + self._ahead - queued)
        found = [self._order.at(position) for position in positions]
        prompts = tuple(encode_prompt(prompt) for prompt in found if prompt is not None)
        try:
            self._session.feed(positions.start, prompts, final=len(prompts) < len(found))
        except Behind:
            return  # the server came back older: its tail, which the session knows now, is fed next

    def _sweep(self) -> None:
        if self._session.stream.shards or time.monotonic() - self._swept > _SWEEP_S:
            sweep(self._session.stream)
            self._swept = time.monotonic()

    def __enter__(self) -> Feeder:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self.join()
