"""As many actors as are wanted, on a real Redis; their processes do nothing but wait."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from buffer.client import Stream
from buffer.local_server import LocalServer
from launch import fleet as fleets
from launch.config import load
from launch.errors import LaunchError
from launch.fleet import Fleet, Launcher, launchers, scale
from launch.local import EvaluatorChild, Interrupt, follow
from launch.supervise import Child, Supervisor
from tests.contract.harness import Run
from tests.waiting import wait_until

WAIT = "import signal; signal.signal(15, lambda *_: exit(0)); print('ready', flush=True); signal.pause()"
STUBBORN = (
    "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
)

CONFIG = load([], ["model.path=m", "data.path=d"])


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an actor's process runs: the last of these."""
    codes = [WAIT]

    def start(children: Supervisor, run: str, name: str, url: str, logs: Path) -> Child:
        child = children.start(name, [sys.executable, "-c", codes[-1]], {}, logs / f"{name}.log")
        wait_until(
            lambda: (logs / f"{name}.log").read_bytes() or child.returncode is not None, 10, "its start"
        )
        return child

    monkeypatch.setattr(fleets, "start_actor", start)
    return codes


@contextmanager
def tended(fleet: Fleet) -> Iterator[None]:
    """Tends a fleet in the background, as a launcher does."""
    over = threading.Event()

    def tend() -> None:
        while not over.wait(0.05):
            fleet.tend()

    thread = threading.Thread(target=tend)
    thread.start()
    yield
    over.set()
    thread.join()


def alive(fleet: Fleet) -> list[str]:
    return [actor.name for actor in fleet.actors if actor.returncode is None]


def test_up_and_down(stream: Stream, code: list[str], tmp_path: Path) -> None:
    Run(stream).start()
    with Supervisor() as children:
        fleet = Fleet(children, stream, "", tmp_path, 2)
        with tended(fleet):
            wait_until(lambda: launchers(stream), 5, "the launcher's line")
            for count, names in ((4, [0, 1, 2, 3]), (1, [0]), (3, [0, 4, 5]), (0, [])):
                found = scale(stream, count, lambda _: None)
                assert [launcher.running for launcher in found.values()] == [count]
                assert alive(fleet) == [f"actor-{number}" for number in names]
        assert not fleet.finished, "more may be wanted again"
        assert [actor.returncode for actor in fleet.actors] == [0] * 6
        fleet.stop()
    assert launchers(stream) == {}


def test_actors_that_are_gone_are_replaced_when_asked(
    stream: Stream, code: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Run(stream).start()
    with Supervisor() as children:
        fleet = Fleet(children, stream, "", tmp_path, 2)
        fleet.actors[0].kill()
        fleet.tend()
        assert alive(fleet) == ["actor-1"]
        assert "actor-0 has ended (-9)" in capfd.readouterr().err
        assert not fleet.all_lost
        with tended(fleet):
            scale(stream, 3, lambda _: None)
        assert alive(fleet) == ["actor-1", "actor-2", "actor-3"]


def test_when_all_have_failed_the_launcher_knows(stream: Stream, code: list[str], tmp_path: Path) -> None:
    Run(stream).start()
    code.append("raise SystemExit(3)")
    with Supervisor() as children:
        fleet = Fleet(children, stream, "", tmp_path, 2)
        fleet.tend()
        assert fleet.all_lost
        assert fleet.finished
        assert [actor.returncode for actor in fleet.failed()] == [3, 3]


def test_one_that_does_not_drain_is_killed_at_the_deadline(
    stream: Stream, code: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(stream).start()
    monkeypatch.setattr(fleets, "DRAIN_S", 0.5)
    code.append(STUBBORN)
    with Supervisor() as children:
        fleet = Fleet(children, stream, "", tmp_path, 1)
        with tended(fleet):
            wait_until(lambda: launchers(stream), 5, "the launcher's line")
            scale(stream, 0, lambda _: None)
        assert [actor.returncode for actor in fleet.actors] == [-9]


def test_several_launchers_share_and_silent_ones_are_left_out(stream: Stream) -> None:
    now = fleets._now(stream)
    lines = {"a/1": Launcher(4, 0, now), "b/2": Launcher(4, 0, now), "gone/3": Launcher(4, 0, now - 60)}
    for name, launcher in lines.items():
        stream.redis.hset(stream.key("fleet"), name, fleets.msgspec.json.encode(launcher))
    seen: list[dict[str, Launcher]] = []

    def answer(found: dict[str, Launcher]) -> None:
        """Both do as they are told, one of them at the second look."""
        seen.append(found)
        for name in ("a/1", "b/2")[: len(seen)]:
            wanted = int(stream.redis.hget(stream.key("fleet"), f"{name}:wanted") or -1)
            line = fleets.msgspec.json.encode(Launcher(wanted, 0, fleets._now(stream)))
            stream.redis.hset(stream.key("fleet"), name, line)

    found = scale(stream, 5, answer)
    assert {name: launcher.running for name, launcher in found.items()} == {"a/1": 3, "b/2": 2}
    assert len(seen) == 3


def test_without_a_launcher_it_says_what_to_do(stream: Stream) -> None:
    with pytest.raises(
        LaunchError, match=r"no launcher of run .*; start actors with `launch actors --count 3`"
    ):
        scale(stream, 3, lambda _: None)


def test_launchers_that_do_not_follow_are_named(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "DRAIN_S", 0.0)
    monkeypatch.setattr(fleets, "_SILENT_S", 1.0)
    line = fleets.msgspec.json.encode(Launcher(1, 0, fleets._now(stream)))
    stream.redis.hset(stream.key("fleet"), "a/1", line)
    with pytest.raises(LaunchError, match=r"not scaled after 1 s: a/1 \(wanted 3\); see their logs"):
        scale(stream, 3, lambda _: None)


def test_a_redis_that_is_gone_does_not_keep_a_launcher_from_its_end(
    code: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalServer.start(tmp_path / "redis") as server, Supervisor() as children:
        stream = Stream.connect(server.socket_url, "run", patience_s=0.2)
        stream.load_library()
        Run(stream).start()
        fleet = Fleet(children, stream, "", tmp_path, 1)
        learner = children.start("learner", [sys.executable, "-c", WAIT], {}, tmp_path / "learner.log")
        wait_until(lambda: learner.log.read_bytes(), 10, "its start")
        with monkeypatch.context() as patch:
            patch.setattr("launch.local.signal.signal", lambda *_: None)  # Ctrl-C stays pytest's
            interrupt = Interrupt()
        interrupt.asked = 1
        server.stop()
        with pytest.raises(LaunchError, match=r"Redis did not answer"):
            follow(stream, [learner], fleet, interrupt, EvaluatorChild(children, CONFIG, ""))
        fleet.stop()
        assert [actor.returncode for actor in fleet.actors] == [0]
        assert learner.process.wait(10) == 0, "it was asked to end"
