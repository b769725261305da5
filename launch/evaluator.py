"""`launch eval --run NAME --watch`: evaluates kept versions of a run while it trains.

Training knows nothing of it but that the newest version which is due stays on disk. The evaluator takes
hold of that folder by hard links, evaluates it with an engine of its own, and looks again; what came
meanwhile and is no longer the newest is skipped, and named.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import redis

from buffer.client import Stream
from buffer.errors import NoRun
from buffer.ledger import Snapshot
from launch.summary import read_jsonl

if TYPE_CHECKING:
    from launch.evaluation import Evaluation
    from learner.kept import Kept

_LOOK_S = 1.0

Evaluate = Callable[[Path, list[int]], "Evaluation"]
"""Evaluates a folder; the list is what was skipped before it."""


class Evaluator:
    """Waits for versions that are multiples of `every`, and evaluates the newest.

    Worked example, `every` 10: at version 23 it evaluates 20; when that is done training is at 47, so it
    evaluates 40 next and says that 30 was skipped.
    """

    def __init__(self, stream: Stream, folder: Path, every: int, evaluate: Evaluate) -> None:
        """`folder`: the run's."""
        from learner.kept import EVALUATIONS, KEPT

        self._stream, self._every, self._evaluate = stream, every, evaluate
        self._kept, self._held, self._file = folder / KEPT, folder / "evaluating", folder / EVALUATIONS
        self._failed = set[str]()
        """Digests of versions whose engine failed."""

    def run(self, stop: Callable[[], bool]) -> None:
        """Until the run is over and its newest due version evaluated, or `stop` is true.

        Raises `LaunchError` where no evaluation can succeed, `StreamError` if Redis is gone.
        """
        while not stop():
            ended = self._ended()
            due = self.due()
            if due is not None:
                self._take(due)
            elif ended:
                return
            else:
                time.sleep(_LOOK_S)

    def _ended(self) -> bool:
        try:
            return bool(self._stream.call(Snapshot()).state["ended"])
        except NoRun:
            return False

    def due(self) -> Kept | None:
        """The newest kept version that is a multiple of `every`, committed, and not evaluated yet."""
        from learner.kept import kept_versions

        for version, kept in reversed(kept_versions(self._kept).items()):
            if version % self._every == 0 and self._committed(kept):
                done = {line["digest"] for line in self._lines()} | self._failed
                return None if kept.digest in done else kept
        return None

    def _committed(self, kept: Kept) -> bool:
        known: Any = self._stream.redis.hget(self._stream.key("versions"), str(kept.version))
        return known is not None and known.decode() == kept.digest

    def skipped(self, version: int) -> list[int]:
        """Versions that were due between the last one evaluated before `version` and it."""
        before = [line["version"] for line in self._lines() if line["version"] < version]
        return list(range(max(before, default=-self._every) + self._every, version, self._every))

    def _take(self, kept: Kept) -> None:
        from actors.errors import EngineError
        from learner.kept import hold

        folder = self._held / str(kept.version)
        shutil.rmtree(self._held, ignore_errors=True)
        if not hold(self._kept, kept, folder):
            return
        skipped = self.skipped(kept.version)
        if skipped:
            print(f"skipped, while others were evaluated: versions {_listed(skipped)}", file=sys.stderr)
        try:
            self._keep(self._evaluate(folder, skipped))
        except EngineError as error:
            self._failed.add(kept.digest)
            print(f"version {kept.version} is not evaluated: {error}", file=sys.stderr)
        finally:
            shutil.rmtree(self._held)

    def _keep(self, found: Evaluation) -> None:
        """Adds to the file, and shows the newest in `{run}:evaluations`."""
        with self._file.open("ab") as file:
            file.write(msgspec.json.encode(found) + b"\n")
        figures = {name: _plain(value) for name, value in msgspec.to_builtins(found).items()}
        try:
            self._stream.redis.hset(self._stream.key("evaluations"), mapping=figures)
        except redis.RedisError as error:
            print(f"the evaluation is in {self._file}, not in Redis: {error}", file=sys.stderr)

    def _lines(self) -> list[dict[str, Any]]:
        return read_jsonl(self._file)


def _plain(value: Any) -> str:
    """A field's value for `redis-cli`: numbers and texts as they are, others as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _listed(versions: list[int]) -> str:
    return ", ".join(map(str, versions))
