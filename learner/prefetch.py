"""The next batch is assigned, read, decoded and made ready by a thread while this one trains.

One step ahead, no further, and by the rules: a step is assigned before its groups are fetched, records that
cannot be read are struck, and the bound counts from the head, which `assign` moves, so staleness stays
counted at the step that trains. At eta = 0 the next batch needs the weights of this one and is not ready
before they are committed: then the thread waits as the learner would.

What needs other ranks is left to the step (`learner/prepare.py`): a collective in a thread beside those of
the step would be one too many.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType

from buffer.errors import StreamError
from buffer.session import Session
from learner.batch import TICK_S, Batch, Fetch, look_for_batch
from learner.errors import LearnerError


class Prefetch(threading.Thread):
    """Fetches batches in the background.

    with Prefetch(session, fetch) as batches:
        batches.next(0, on_wait)       # the batch of step 0
        batches.ahead(1)               # that of step 1 is fetched from now on
        batches.next(1, on_wait)
    """

    def __init__(self, session: Session, fetch: Fetch) -> None:
        super().__init__(name="prefetch", daemon=True)
        self._session, self._fetch = session, fetch
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Batch | StreamError | LearnerError | None] = queue.SimpleQueue()
        self._asked: int | None = None
        self._stopped = threading.Event()
        self._reason = "few"

    def next(self, step: int, on_wait: Callable[[str], None]) -> Batch | None:
        """The batch of a step, or None once the run is over.

        `on_wait` hears, in this thread, each reason to wait. Raises what the stream or `fetch` raised.
        """
        began = time.monotonic()
        if self._asked is None:
            self.ahead(step)
        assert self._asked == step, f"step {step} was asked for, {self._asked} is being fetched"
        while True:
            try:
                found = self._found.get(timeout=TICK_S)
                break
            except queue.Empty:
                if not self.is_alive():
                    raise LearnerError("the thread that fetches batches has died; see above why") from None
                on_wait(self._reason)
        self._asked = None
        if isinstance(found, Exception):
            raise found
        if found is not None:
            found.waited_s = time.monotonic() - began
        return found

    def ahead(self, step: int) -> None:
        """Begins to look for the batch of a step, which `next` will be asked for."""
        self._asked, self._reason = step, "few"
        self._wanted.put(step)

    def run(self) -> None:
        """Answers each step that is asked for."""
        while (step := self._wanted.get()) is not None:
            try:
                self._found.put(self._look(step))
            except (StreamError, LearnerError) as error:
                self._found.put(error)

    def _on_wait(self, reason: str) -> None:
        self._reason = reason

    def _look(self, step: int) -> Batch | None:
        return look_for_batch(self._session, step, self._fetch, self._on_wait, self._stopped)

    def __enter__(self) -> Prefetch:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._wanted.put(None)
        self.join()
