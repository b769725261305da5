"""What a scripted process says (one JSON line an event), where it can be hit, and how it ends.

`SLIPSTREAM_FAULT=role:point:n[:action]`, several separated by commas: the n-th time (from 1) that the
process of that role reaches the point, it is hit. Actions: `kill` (default, SIGKILL) and `stop`
(SIGSTOP, until the test continues it).
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from buffer.errors import Fenced, ForeignRun, StreamError

FENCED, FAILED, FOREIGN = 1, 2, 4
"""Exit codes: another process took over; an error of the stream; the server holds another run."""
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Log:
    """Appends events to a file, each in one write: a line that was written survives a kill -9."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, event: str, **fields: Any) -> None:
        """Writes one line; `t` is the machine's monotonic clock in seconds, the same for all processes."""
        line = msgspec.json.encode({"event": event, "t": time.monotonic(), **fields})
        os.write(self._file, line + b"\n")


class Faults:
    """The faults of one process."""

    def __init__(self, role: str) -> None:
        self._seen: Counter[str] = Counter()
        self._wanted: dict[tuple[str, int], str] = {}
        for spec in filter(None, os.environ.get("SLIPSTREAM_FAULT", "").split(",")):
            hit, point, number, *action = spec.split(":")
            if hit == role:
                self._wanted[point, int(number)] = action[0] if action else "kill"

    def at(self, point: str) -> None:
        """Passes a point, or does not."""
        if action := self.wanted(point):
            os.kill(os.getpid(), action)

    def wanted(self, point: str) -> signal.Signals | None:
        """Counts that a point was reached; the signal that is due there."""
        self._seen[point] += 1
        action = self._wanted.get((point, self._seen[point]))
        return _SIGNALS[action] if action else None


def to_the_end(log: Log, live: Callable[[], str]) -> int:
    """Lives until it returns the reason; the exit code. An error of the stream ends it in one line, too."""
    try:
        reason, code = live(), 0
    except Fenced as error:
        reason, code = f"another process took this place: {error}", FENCED
    except ForeignRun as error:
        reason, code = f"foreign run: {error}", FOREIGN
    except StreamError as error:
        reason, code = f"{type(error).__name__}: {error}", FAILED
    log("stopped", reason=reason, code=code)
    return code
