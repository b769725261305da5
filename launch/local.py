"""A run on this machine: the learner's and the actors' processes, followed until the end."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec
import redis

from buffer.client import Stream
from buffer.connect import connect
from buffer.errors import NoRun, RedisUnavailable, StreamError
from buffer.ledger import ActorRecord, Ledger, Snapshot
from launch.config import RunConfig, to_json
from launch.errors import LaunchError
from launch.fleet import Fleet
from launch.nodes import Nodes
from launch.status import find_run, of_ledger, progress_line
from launch.supervise import Child, Supervisor, process_environment

_LOOK_S = 0.5
_QUIET_S = 15.0
"""Between two progress lines where the output is no terminal."""


def run_folder(name: str) -> Path:
    """Where a run leaves its files: `runs/<name>`."""
    return Path("runs") / name


def start_learner(
    children: Supervisor, config: RunConfig, url: str, folder: Path, nodes: Nodes, fork: int | None = None
) -> list[Child]:
    """Starts the learner's processes on this machine, rank 0 first; they read `config.json` of the folder.

    `fork` is that of `learner.worker.Learner`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(to_json(config))
    argv = [sys.executable, "-m", "learner.worker", "--folder", str(folder)]
    argv += [] if fork is None else ["--fork", str(fork)]
    ranks = []
    for variables in nodes.ranks():
        rank = int(variables.get("RANK", "0"))
        name = f"learner-{rank}" if rank else "learner"
        environment = {**process_environment(url), **variables}
        ranks.append(children.start(name, argv, environment, folder / "logs" / f"{name}.log"))
    return ranks


def start_recorder(children: Supervisor, run: str, url: str, folder: Path) -> Child:
    """Starts a process that records the run to `record` in the folder."""
    argv = [sys.executable, "-m", "launch.cli", "record", "--run", run, "--out", str(folder / "record")]
    return children.start("recorder", argv, process_environment(url), folder / "logs" / "recorder.log")


class Interrupt:
    """Counts Ctrl-C and SIGTERM: the first asks for an orderly end, the third ends at once."""

    def __init__(self) -> None:
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 2:
            raise KeyboardInterrupt


class Progress:
    """The live line: rewritten in place on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._last, self._shown = 0.0, ""

    def show(self, text: str) -> None:
        """Shows a line if it is time to."""
        pause = _LOOK_S if sys.stderr.isatty() else _QUIET_S
        if text != self._shown and time.monotonic() - self._last >= pause:
            print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="", file=sys.stderr)
            print("" if sys.stderr.isatty() else "\n", end="", file=sys.stderr, flush=True)
            self._last, self._shown = time.monotonic(), text

    def close(self) -> None:
        """Ends the line."""
        if sys.stderr.isatty():
            print(file=sys.stderr)


class EvaluatorChild:
    """The process that evaluates versions of a run while it trains, if `evaluation.every` asks for one.

    It ends by itself with the run, so it is started once the run is seen to go on: one that is resumed still
    says that it ended.
    """

    def __init__(self, children: Supervisor, config: RunConfig, url: str) -> None:
        self._children, self._config, self._url = children, config, url
        self._child: Child | None = None

    def begin(self) -> None:
        """Starts it, once."""
        name, settings = self._config.name, self._config.evaluation
        if self._child is None and settings.every and settings.start:
            argv = [sys.executable, "-m", "launch.cli", "eval", "--watch", "--run", name]
            log = run_folder(name) / "logs" / "evaluator.log"
            self._child = self._children.start("evaluator", argv, process_environment(self._url), log)

    def finish(self, interrupt: Interrupt) -> None:
        """Waits for the evaluation of the last version; Ctrl-C ends the wait. Says so if it failed."""
        self.begin()
        if self._child is None:
            return
        progress = Progress()
        while self._child.returncode is None and not interrupt.asked:
            progress.show("the run is over; its last version is being evaluated (Ctrl-C leaves that out) ...")
            time.sleep(_LOOK_S)
        progress.close()
        if self._child.returncode:
            print(f"evaluator: {self._child.last_words()}  (log: {self._child.log})", file=sys.stderr)


def follow(
    stream: Stream,
    ranks: Sequence[Child],
    fleet: Fleet | None,
    interrupt: Interrupt,
    evaluator: EvaluatorChild,
) -> Ledger | None:
    """Shows progress and tends the actors of `fleet` until the learner's rank 0 ends; the last snapshot, None
    if there never was a run.

    Actors that have left since are in it as they were seen last.

    Raises `LaunchError` if a rank of the learner, or every actor, fails.
    """
    progress, ledger, told, learner = Progress(), None, False, ranks[0]
    seen: dict[str, ActorRecord] = {}
    while learner.returncode is None:
        if interrupt.asked and not told:
            print("\nstopping after this step ...", file=sys.stderr)
            with contextlib.suppress(redis.RedisError):  # the learner says so itself, once Redis answers
                stream.redis.set(stream.key("stop"), "asked")
            learner.process.terminate()
            told = True
        ledger = _look(stream) or ledger
        seen |= ledger.actors if ledger is not None else {}
        if ledger is not None and not ledger.state["ended"]:
            evaluator.begin()
        progress.show(progress_line(of_ledger(stream.run, ledger)) if ledger else "starting ...")
        if fleet is not None:
            fleet.tend()
            if fleet.all_lost:
                actor = fleet.failed()[0]
                raise LaunchError(f"no actor is left; {actor.last_words()}  (logs: {actor.log.parent})")
        if any(rank.returncode for rank in ranks):
            break
        time.sleep(_LOOK_S)
    progress.close()
    _check_ranks(ranks)
    ledger = _look(stream) or ledger
    return None if ledger is None else msgspec.structs.replace(ledger, actors=seen | ledger.actors)


def _check_ranks(ranks: Sequence[Child]) -> None:
    """Raises `LaunchError` with what the failed ones said; one that fails takes the others with it."""
    failed = [rank for rank in ranks if rank.returncode]
    if failed:
        said = "; ".join(f"{rank.name}: {rank.last_words()}" for rank in failed)
        raise LaunchError(f"{said}  (logs: {failed[0].log.parent})")


def follow_node(ranks: Sequence[Child], interrupt: Interrupt) -> None:
    """Waits for the ranks of a node without rank 0, which rank 0 ends. Raises `LaunchError` if one fails."""
    while any(rank.returncode is None for rank in ranks) and not interrupt.asked:
        _check_ranks(ranks)
        time.sleep(_LOOK_S)
    _check_ranks(ranks)


def _look(stream: Stream) -> Ledger | None:
    try:
        return stream.call(Snapshot())
    except NoRun:
        return None
    except StreamError as error:
        raise LaunchError(str(error)) from error


def run_actors(url: str, run: str | None, count: int, interrupt: Interrupt) -> int:
    """Starts `count` actors of a run, waiting for the run if need be; 0 when all have left in order."""
    name = await_run(url, run, interrupt)
    if name is None:
        return 0
    logs, stream = run_folder(name) / "logs", Stream(connect(url), name)
    with Supervisor() as children:
        fleet = Fleet(children, stream, url, logs, count)
        print(f"run {name}: {count} actors (logs: {logs})", file=sys.stderr)
        while not interrupt.asked and not fleet.finished:
            fleet.tend()
            time.sleep(_LOOK_S)
        fleet.stop()
    for actor in fleet.failed():
        print(f"{actor.name} ended with {actor.returncode}: {actor.last_words()}", file=sys.stderr)
    return 2 if fleet.failed() else 0


def await_run(url: str, run: str | None, interrupt: Interrupt) -> str | None:
    """The name of a run that goes on, once there is one; None if interrupted first."""
    told = False
    while not interrupt.asked:
        try:
            return find_run(url, run, ended=False).run
        except NoRun as error:
            if not told:
                print(f"waiting for a learner: {error}", file=sys.stderr)
                told = True
            time.sleep(_LOOK_S)
    return None


def stop_run(stream: Stream, timeout_s: float = 120.0) -> None:
    """Asks a run to end and waits until the learner and the live actors have left. Raises `LaunchError`."""
    stream.redis.set(stream.key("stop"), "asked")
    print(f"stopping run {stream.run} after the step under way ...", file=sys.stderr)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            ledger = stream.call(Snapshot())
        except RedisUnavailable:
            return  # a demo takes its Redis with it
        if ledger.state["ended"] and not any(ledger.alive(name) for name in ledger.actors):
            return
        time.sleep(_LOOK_S)
    raise LaunchError(f"run {stream.run} has not ended after {timeout_s:.0f} s; see `launch status`")
