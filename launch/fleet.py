"""The actors that a launcher runs on its machine: as many as are wanted, which `launch scale` may change.

Every launcher (`launch actors`, `launch demo`) keeps its line of `{run}:fleet` fresh and looks there for how
many actors it is to run; `launch scale actors N` shares N out among the launchers that are alive.

    fleet = Fleet(children, stream, url, logs, count=2)
    while training:
        fleet.tend()            # starts and drains actors
    fleet.stop()
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import redis

from buffer.client import Stream
from buffer.keys import key
from launch.errors import LaunchError
from launch.supervise import DRAIN_S, Child, Supervisor, process_environment

_SILENT_S = 10.0
"""A launcher that has not been heard of for this long is gone."""


class Launcher(msgspec.Struct, frozen=True):
    """What a launcher says of itself."""

    running: int
    """Actors that it runs, those that are starting among them."""
    draining: int
    """Actors that finish what they have and leave."""
    seen: float
    """When it said so, seconds of the server's clock."""


class Fleet:
    """One launcher's actors of a run."""

    def __init__(self, children: Supervisor, stream: Stream, url: str, logs: Path, count: int) -> None:
        """Starts `count` actors. `logs` is the folder of their logs."""
        self.name = f"{socket.gethostname()}/{os.getpid()}"
        self.actors: list[Child] = []
        """Every actor it ever started."""
        self._children, self._stream, self._url, self._logs = children, stream, url, logs
        self._wanted, self._ended = count, False
        self._leaving: dict[str, float] = {}
        self._lost: set[str] = set()
        self._resize(count)

    def tend(self) -> None:
        """Starts or drains actors, if another number of them is wanted now; to be called twice a second."""
        for actor in self._running():
            if actor.returncode and actor.name not in self._lost:
                self._lost.add(actor.name)
                print(f"\n{actor.name} has ended ({actor.returncode}): {actor.last_words()}", file=sys.stderr)
        for actor in self.actors:
            if actor.returncode is None and time.monotonic() > self._leaving.get(actor.name, float("inf")):
                actor.kill()
        try:
            wanted: Any = self._stream.redis.hget(self._key, f"{self.name}:wanted")
            if wanted is not None and int(wanted) != self._wanted:
                self._wanted = int(wanted)
                self._resize(self._wanted)
            self._say()
            self._ended = bool(self._stream.redis.hget(self._stream.key("state"), "ended"))
        except (redis.RedisError, OSError):
            return  # actors wait for Redis by themselves

    def stop(self) -> None:
        """Drains all actors and waits until they have left; a Redis that is gone needs no telling."""
        self._children.stop(self.actors)
        with contextlib.suppress(redis.RedisError):
            self._stream.redis.hdel(self._key, self.name, f"{self.name}:wanted")

    @property
    def all_lost(self) -> bool:
        """Whether there are actors, and every one of them has failed."""
        running = self._running()
        return bool(running) and all(actor.name in self._lost for actor in running)

    @property
    def finished(self) -> bool:
        """Whether no actor runs any more, and none is expected to."""
        ended = all(actor.returncode is not None for actor in self.actors)
        return ended and (self._wanted > 0 or self._ended)

    def failed(self) -> list[Child]:
        """Actors that ended with an error; one that was asked to leave must do so with code 0, too."""
        return [actor for actor in self.actors if actor.returncode]

    @property
    def _key(self) -> str:
        return self._stream.key("fleet")

    def _running(self) -> list[Child]:
        """Those that were not asked to leave."""
        return [actor for actor in self.actors if actor.name not in self._leaving]

    def _resize(self, wanted: int) -> None:
        alive = [actor for actor in self._running() if actor.returncode is None]
        for actor in alive[wanted:]:
            self._leaving[actor.name] = time.monotonic() + DRAIN_S
            actor.process.terminate()
        if wanted > len(alive):
            for name in actor_names(self._stream.redis, self._stream.run, wanted - len(alive)):
                self.actors.append(start_actor(self._children, self._stream.run, name, self._url, self._logs))

    def _say(self) -> None:
        alive = [actor.name for actor in self.actors if actor.returncode is None]
        draining = sum(name in self._leaving for name in alive)
        launcher = Launcher(len(alive) - draining, draining, _now(self._stream))
        self._stream.redis.hset(self._key, self.name, msgspec.json.encode(launcher))


def start_actor(children: Supervisor, run: str, name: str, url: str, logs: Path) -> Child:
    """Starts an actor's process."""
    argv = [sys.executable, "-m", "actors.worker", "--run", run, "--name", name, "--logs", str(logs)]
    return children.start(name, argv, process_environment(url), logs / f"{name}.log")


def actor_names(client: redis.Redis, run: str, count: int) -> list[str]:
    """`count` names that no actor of the run has had."""
    last = int(client.incrby(key(run, "actor_numbers"), count))
    return [f"actor-{number}" for number in range(last - count, last)]


def launchers(stream: Stream) -> dict[str, Launcher]:
    """The launchers of a run that are alive, by name."""
    said: Any = stream.redis.hgetall(stream.key("fleet"))
    now = _now(stream)
    known = {
        name.decode(): msgspec.json.decode(value, type=Launcher)
        for name, value in said.items()
        if not name.endswith(b":wanted")
    }
    return {name: known[name] for name in sorted(known) if now - known[name].seen < _SILENT_S}


def shares(count: int, names: list[str]) -> dict[str, int]:
    """`count` actors shared out as evenly as possible.

    >>> shares(5, ["a", "b"])
    {'a': 3, 'b': 2}
    """
    return {name: count // len(names) + (i < count % len(names)) for i, name in enumerate(names)}


def scale(stream: Stream, count: int, on_look: Callable[[dict[str, Launcher]], None]) -> dict[str, Launcher]:
    """Has the launchers of a run run `count` actors together, and waits until they do; the launchers then.

    `on_look` sees them twice a second. Raises `LaunchError` if there is no launcher, or one does not follow.
    """
    if not (found := launchers(stream)):
        raise LaunchError(
            f"no launcher of run {stream.run} is alive; start actors with `launch actors --count {count}`"
        )
    wanted = shares(count, list(found))
    for name, share in wanted.items():
        stream.redis.hset(stream.key("fleet"), f"{name}:wanted", share)
    deadline = time.monotonic() + DRAIN_S + _SILENT_S
    while time.monotonic() < deadline:
        found = launchers(stream)
        on_look(found)
        if all(
            name in found and (found[name].running, found[name].draining) == (share, 0)
            for name, share in wanted.items()
        ):
            return found
        time.sleep(0.5)
    behind = ", ".join(
        f"{name} (wanted {share})"
        for name, share in wanted.items()
        if name not in found or found[name].running != share
    )
    raise LaunchError(
        f"not scaled after {DRAIN_S + _SILENT_S:.0f} s: {behind or 'actors still drain'}; see their logs"
    )


def _now(stream: Stream) -> float:
    """Seconds of the server's clock."""
    seconds, micros = stream.redis.time()
    return float(seconds) + float(micros) / 1e6
