"""A broadcast to all agents that are ready: it ends for everybody, and who misses it pulls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from tests.unit.weightsync.versions import holding, version
from weightsync.errors import SourceError, Superseded
from weightsync.image import Image
from weightsync.staging import Staging
from weightsync.transports import gloo
from weightsync.transports import round as rounds
from weightsync.transports.gloo import Gloo, Round
from weightsync.transports.peer import Peer

TIMEOUT_S = 5.0


def go_on() -> None:
    """Nobody wants another version."""


class Agent(threading.Thread):
    """One agent's part in a round."""

    def __init__(self, one: Round, staging: Staging, label: str) -> None:
        super().__init__()
        self.staging, self.problem = staging, ""
        self._round, self._label = one, label
        self.start()

    def run(self) -> None:
        try:
            Gloo(TIMEOUT_S).fetch(self._round.source, self._label, self.staging)
        except (SourceError, Superseded) as error:
            self.problem = f"{type(error).__name__}: {error}"


def test_all_that_come_in_time_have_it_and_a_late_one_is_told() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        one = Round("127.0.0.1", manifest, image, holder.sources(manifest.label)[-1], TIMEOUT_S)
        agents = [Agent(one, Staging(manifest, None, go_on), manifest.label) for _ in range(3)]
        for agent in agents:
            agent.join()
        one.join(TIMEOUT_S)
        assert one.took == 3
        for agent in agents:
            assert not agent.problem
            assert bytes(agent.staging.finish().readable()) == bytes(image.readable())
        late = Agent(one, Staging(manifest, None, go_on), manifest.label)
        late.join()
        assert "on its way to 3 others already" in late.problem
        assert (
            Gloo(TIMEOUT_S).manifest(one.source, manifest.label)
            == holder.answer(f"/{manifest.label}/manifest")[0]
        )  # type: ignore[index]


@pytest.mark.parametrize(("live", "gather_s"), [(2, 60.0), (3, 0.2)])
def test_nobody_is_waited_for_once_all_have_come(
    monkeypatch: pytest.MonkeyPatch, live: int, gather_s: float
) -> None:
    monkeypatch.setattr(rounds, "GATHER_S", gather_s)
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        pull = holder.sources(manifest.label)[-1]
        one = Round("127.0.0.1", manifest, image, pull, TIMEOUT_S, lambda: live)
        agents = [Agent(one, Staging(manifest, None, go_on), manifest.label) for _ in range(2)]
        for agent in agents:
            agent.join()
        assert [agent.problem for agent in agents] == ["", ""]
        one.join(TIMEOUT_S)
        assert one.took == 2


def test_one_that_leaves_in_the_middle_costs_the_others_no_verified_chunk() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        pull = holder.sources(manifest.label)[-1]
        one = Round("127.0.0.1", manifest, image, pull, 1.0)
        stays = Agent(one, Staging(manifest, None, go_on), manifest.label)
        leaves = Agent(one, Staging(manifest, None, quits_after(1)), manifest.label)
        began = time.monotonic()
        for agent in (stays, leaves):
            agent.join()
        assert time.monotonic() - began < 10 * TIMEOUT_S
        assert leaves.problem.startswith("Superseded")
        missing = stays.staging.missing()
        assert 0 < len(missing) < len(manifest.chunks)
        Peer(TIMEOUT_S).fetch(pull, manifest.label, stays.staging)
        assert holder.served_bytes == sum(manifest.chunks[number].size for number in missing)
        assert bytes(stays.staging.finish().readable()) == bytes(image.readable())


def test_where_a_broadcast_that_failed_may_still_write_nothing_comes_any_more() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        pull = holder.sources(manifest.label)[-1]
        one, staging = Round("127.0.0.1", manifest, image, pull, 1.0), Staging(manifest, None, go_on)
        given = list[memoryview]()

        def noted(parts: Iterable[memoryview]) -> Iterator[memoryview]:
            for part in parts:
                given.append(part)
                yield part

        keep = staging.keep
        staging.keep = lambda number, parts: keep(number, noted(parts))  # type: ignore[method-assign]
        agents = [Agent(one, staging, manifest.label)]
        agents.append(Agent(one, Staging(manifest, None, quits_after(1)), manifest.label))
        for agent in agents:
            agent.join()
        assert agents[0].problem.startswith("SourceError")
        late = list(given)
        given.clear()
        Peer(TIMEOUT_S).fetch(pull, manifest.label, staging)
        assert given
        assert not places(late) & places(given)


def places(parts: Iterable[memoryview]) -> set[int]:
    """Where in memory they begin."""
    return {np.frombuffer(part, np.uint8).ctypes.data for part in parts}


def test_what_comes_does_not_touch_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = version(4)
    write = Image.write

    def late(self: Image, offset: int, data: memoryview) -> None:
        time.sleep(0.05)
        write(self, offset, data)

    with holding(image, manifest) as (holder, _):
        one = Round("127.0.0.1", manifest, image, holder.sources(manifest.label)[-1], TIMEOUT_S)
        monkeypatch.setattr(Image, "write", late)
        agent = Agent(one, Staging(manifest, None, go_on), manifest.label)
        agent.join()
        assert not agent.problem
        assert bytes(agent.staging.finish().readable()) == bytes(image.readable())


def quits_after(looks: int) -> Callable[[], None]:
    """Raises at the n-th look."""
    left = [looks]

    def look() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Superseded("another version is wanted")

    return look


def test_a_round_that_nobody_comes_to_ends_when_it_is_closed() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        one = Round("127.0.0.1", manifest, image, holder.sources(manifest.label)[-1], TIMEOUT_S)
        one.close()
        one.join(TIMEOUT_S)
        assert one.took == 0


def test_a_learner_that_is_gone_is_a_source_that_is_gone() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        one = Round("127.0.0.1", manifest, image, holder.sources(manifest.label)[-1], TIMEOUT_S)
        source = one.source
        one.close()
        one.join(TIMEOUT_S)
        del one
        with pytest.raises(SourceError, match="gloo"):
            Gloo(0.5).fetch(source, manifest.label, Staging(manifest, None, go_on))


def test_a_broadcast_is_for_those_that_have_nothing_yet() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        staging = Staging(manifest, None, go_on)
        source = gloo.Source("gloo", "127.0.0.1:1", holder.url)
        assert Gloo(1).reaches(source, None)
        assert Gloo(1).reaches(source, staging)
        staging.adopt(image)
        assert not Gloo(1).reaches(source, staging)
