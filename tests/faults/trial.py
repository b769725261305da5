"""A run whose processes a test may kill: starting them, reading their logs, waiting for what they say.

trial = Trial(server, spawner, folder, batch=2, eta=1)
learner = trial.learner(fault="learner:trained:3")
actors = [trial.actor(), trial.actor()]
learner.wait_killed()
trial.learner()
trial.wait_steps(10)
trial.finish()                 # stops the run; checks I1 to I6
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from buffer.client import Stream
from buffer.config import StreamConfig
from buffer.ledger import Ledger, Snapshot
from tests.faults.actor import ActorSettings
from tests.faults.invariants import broken
from tests.faults.learner import LearnerSettings
from tests.faults.server import Server
from tests.faults.spawner import Spawner, Start

PATIENCE_S = 40.0


class Process:
    """A scripted process. Only its own pid is ever signalled."""

    def __init__(self, spawner: Spawner, module: str, settings: Any, folder: Path, fault: str) -> None:
        self.name = Path(settings.log).stem
        self.errors, self.log = folder / f"{self.name}.stderr", Path(settings.log)
        self.expected = 0
        """The exit code that is right."""
        self._events: list[dict[str, Any]] = []
        self._offset = 0
        self._code: int | None = None
        self._spawner = spawner
        self.forgot = False
        """Whether the test gave Redis an older file, which may lack what was acknowledged."""
        self.errors.touch()
        request = Start(module, msgspec.json.encode(settings).decode(), fault, str(self.errors))
        self.pid = spawner.start(request)

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._spawner.poll(self.pid)
        return self._code

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.code is None

    def events(self, event: str = "") -> list[dict[str, Any]]:
        """What it has logged so far; of one kind, if named."""
        if self.log.exists():
            with self.log.open("rb") as file:
                file.seek(self._offset)
                lines, whole, _ = file.read().rpartition(b"\n")
            self._offset += len(lines) + len(whole)
            self._events += [msgspec.json.decode(line) for line in lines.splitlines()]
        return [one for one in self._events if event in ("", one["event"])]

    def wait_event(self, event: str, count: int = 1, *, seconds: float = PATIENCE_S, **fields: Any) -> dict:
        """The count-th event of a kind (with these fields)."""

        def found() -> dict | None:
            like = [one for one in self.events(event) if fields.items() <= one.items()]
            return like[count - 1] if len(like) >= count else None

        return until(found, seconds, f"{self.name} says {event} {fields}; stderr: {self.errors.read_text()}")

    def wait(self, code: int = 0, *, seconds: float = PATIENCE_S) -> None:
        """Waits for its end, with this exit code."""
        self.expected = code
        until(lambda: not self.running, seconds, lambda: f"{self.name} ends; {self.said()}")
        assert self.code == code, self.said()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(-signal.SIGKILL)

    def wait_killed(self) -> None:
        """Waits for the kill at its point."""
        self.wait(-signal.SIGKILL)

    def wait_stopped(self) -> None:
        """Waits until it has been stopped at its point."""
        stat = Path(f"/proc/{self.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", PATIENCE_S, "it stops")

    def stop(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def said(self) -> str:
        """Its last words, for a test that fails."""
        return f"{self.name}: {self.code} {self.events()[-3:]} {self.errors.read_text()[-1500:]}"


class Trial:
    """One run and all its processes so far."""

    def __init__(
        self, server: Server, spawner: Spawner, folder: Path, *, batch: int = 2, eta: int = 1, **rules: Any
    ) -> None:
        self.server, self.folder, self.run, self.seed = server, folder, f"run-{folder.name}", 5
        chosen = {"max_steps": 100_000, "lease_s": 1.0, "attempts": 50, "group_size": 2, **rules}
        self.config = StreamConfig(groups_per_step=batch, max_staleness=eta, **chosen)
        self._spawner = spawner
        self.forgot = False
        """Whether the test gave Redis an older file, which may lack what was acknowledged."""
        self.learners: list[Process] = []
        self.actors: list[Process] = []
        (folder / "logs").mkdir()
        self.stream = Stream(server.redis, self.run, patience_s=20)

    def learner(self, *, fault: str = "", url: str = "", **settings: Any) -> Process:
        """Starts a learner process, on the checkpoints that are there."""
        told = LearnerSettings(
            url=url or self.server.url,
            run=self.run,
            log=str(self.folder / f"logs/learner-{len(self.learners)}.jsonl"),
            folder=str(self.folder / "checkpoints"),
            stream=self.config,
            seed=self.seed,
            **settings,
        )
        self.learners.append(Process(self._spawner, "learner", told, self.folder / "logs", fault))
        return self.learners[-1]

    def actor(self, name: str = "", *, fault: str = "", url: str = "", **settings: Any) -> Process:
        """Starts an actor process; the name of one that died starts it again."""
        told = ActorSettings(
            url=url or self.server.url,
            run=self.run,
            name=name or f"actor-{len(self.actors)}",
            log=str(self.folder / f"logs/actor-{len(self.actors)}.jsonl"),
            seed=self.seed,
            group_size=self.config.group_size,
            lease_s=self.config.lease_s,
            **settings,
        )
        self.actors.append(Process(self._spawner, "actor", told, self.folder / "logs", fault))
        return self.actors[-1]

    def ledger(self) -> Ledger:
        """A full snapshot."""
        return self.stream.call(Snapshot(full=True))

    def trained(self) -> list[dict[str, Any]]:
        """Every `trained` event of every learner."""
        return [one for learner in self.learners for one in learner.events("trained")]

    def steps(self) -> int:
        """Steps committed so far, as the learners say."""
        said = [one["version"] for learner in self.learners for one in learner.events("committed")]
        return max(said, default=0)

    def wait_steps(self, steps: int, *, seconds: float = PATIENCE_S) -> float:
        """Waits until `steps` are committed; the seconds it took."""
        begun = time.monotonic()

        def there() -> bool:
            for one in self._everybody():
                assert one.code in (None, 0, one.expected), one.said()
            return self.steps() >= steps

        until(there, seconds, lambda: f"{steps} steps; {self._state()}")
        return time.monotonic() - begun

    def wait_more(self, steps: int, *, seconds: float = PATIENCE_S) -> float:
        """Waits for this many more steps; the seconds it took."""
        return self.wait_steps(self.steps() + steps, seconds=seconds)

    def _state(self) -> str:
        lines = [
            f"{one.name}: {one.events()[-2:]} {one.errors.read_text()[-800:]}" for one in self._everybody()
        ]
        return f"at {self.steps()}\n" + "\n".join(lines)

    def _everybody(self) -> list[Process]:
        return self.learners + self.actors

    def finish(self) -> Ledger:
        """Has the run end after the step under way, waits for everybody, checks I1 to I6."""
        self.stream.redis.set(self.stream.key("stop"), 1)
        for process in self._everybody():
            if process.running:
                process.wait(0)
        return self.check()

    def check(self) -> Ledger:
        """I1 to I6 of what happened so far; the ledger."""
        ledger = self.ledger()
        found = broken(ledger, self.learners, self.actors, self.config.max_staleness, forgot=self.forgot)
        assert not found, "\n".join(found)
        return ledger

    def end(self) -> None:
        """Ends what still runs."""
        for process in self._everybody():
            if process.running:
                process.kill()

    def close(self) -> None:
        """Ends what still runs, and the connection."""
        self.end()
        self.stream.close()


def until(condition: Callable[[], Any], seconds: float, what: str | Callable[[], str]) -> Any:
    """The first true value of `condition`, looked at every 50 ms."""
    deadline, over = time.monotonic() + seconds, False
    while not over:
        over = time.monotonic() > deadline  # looked at once more: a busy machine may have slept for long
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what if isinstance(what, str) else what()}")
