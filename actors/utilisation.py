"""How well an engine is used: of the time in which a lease is held, the share with a request under way.

Worked example: a lease from 0 to 10 s, a request from 1 to 9 s, new weights from 4 to 5 s: held 9 s,
busy 7 s. Time in which new weights go in counts for neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Utilisation:
    """Two clocks, which `note` drives: call it at every change, and before they are read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self._held = self._busy = False
        self.held_s = 0.0
        """Seconds with at least one lease."""
        self.busy_s = 0.0
        """Seconds of those with at least one request under way."""

    def note(self, *, leases: int, requests: int, updating: bool) -> None:
        """How it is from now on."""
        now = self._clock()
        if self._held:
            self.held_s += now - self._since
            if self._busy:
                self.busy_s += now - self._since
        self._since = now
        self._held, self._busy = leases > 0 and not updating, requests > 0
