"""Questions that a run has learned, or cannot learn yet, are left out of later epochs.

    order = Curriculum(PromptOrder(prompts, seed=0), stream, solved=2, failed=5)
    order.at(0)                 # epoch 0 asks every question
    order.at(len(prompts))      # epoch 1 leaves out what was solved twice or failed five times by then

What an epoch leaves out is decided when its first position is fed, and kept in `{run}:curriculum`, so
that a run that is continued asks the same.
"""

from __future__ import annotations

import logging
from bisect import bisect_right

import msgspec

from buffer.client import Stream
from buffer.difficulty import difficulties
from buffer.schema import Prompt
from learner.datasets import PromptOrder

log = logging.getLogger("learner")


class Curriculum:
    """An order of prompts without those that are solved or hopeless."""

    def __init__(self, order: PromptOrder, stream: Stream, *, solved: int, failed: int) -> None:
        """Leaves out rows solved `solved` or failed `failed` times; 0 leaves none out for that reason."""
        self._order, self._stream, self._solved, self._failed = order, stream, solved, failed
        self._epochs: list[list[Prompt]] = []
        self._starts: list[int] = [0]
        """Position of the first prompt of every epoch, and of the one to come."""

    def at(self, position: int) -> Prompt | None:
        """The prompt at a position of the run, from 0; None after the last epoch, or when none is left."""
        while position >= self._starts[-1]:
            prompts = self._order.epoch(len(self._epochs))
            if prompts is None:
                return None
            left_out = self._left_out(len(self._epochs), prompts)
            kept = [prompt for prompt in prompts if prompt.row not in left_out]
            if not kept:
                log.warning("every question is solved or failed too often: the data ends here")
                return None
            self._epochs.append(kept)
            self._starts.append(self._starts[-1] + len(kept))
        epoch = bisect_right(self._starts, position) - 1
        return self._epochs[epoch][position - self._starts[epoch]]

    def _left_out(self, epoch: int, prompts: list[Prompt]) -> set[int]:
        """Rows that an epoch leaves out, as decided now or before."""
        stream, key = self._stream, self._stream.key("curriculum")
        decided = stream.patiently(lambda: stream.redis.hget(key, str(epoch)))
        if decided is not None:
            return set(msgspec.json.decode(decided, type=list[int]))
        known = difficulties(stream)
        rows = {prompt.row for prompt in prompts} & known.keys()
        solved = {row for row in rows if 0 < self._solved <= known[row].solved}
        failed = {row for row in rows if 0 < self._failed <= known[row].failed}
        left_out = sorted(solved | failed)
        stream.patiently(lambda: stream.redis.hset(key, str(epoch), msgspec.json.encode(left_out)))
        if left_out:
            counts = f"{len(left_out)} of {len(prompts)}, {len(solved)} as solved and {len(failed)} as failed"
            log.info("epoch %d leaves out %s", epoch, counts)
        return set(left_out)
