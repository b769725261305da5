"""The agent: newest wins, pulls are finished while of use, nothing uncommitted or partial is applied."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from msgspec.structs import replace

from tests.unit.weightsync.versions import offer_of, version
from weightsync import agent as module
from weightsync.agent import Agent, Standing
from weightsync.errors import SourceError, Untouched
from weightsync.guard import Place
from weightsync.holder import Held, Holder
from weightsync.manifest import encode_manifest
from weightsync.protocol import Offer, Source
from weightsync.staging import Staging
from weightsync.transports.peer import Peer


class Medium:
    """A transport of the test's own: what it holds, where it breaks off, and when it goes on."""

    kind = "test"

    def __init__(self, *numbers: int) -> None:
        self.versions = {manifest.label: (image, manifest) for image, manifest in map(version, numbers)}
        self.break_at: list[int] = []
        """Chunks at which one fetch after another breaks off."""
        self.fetched: list[int] = []
        """Every chunk that was brought."""
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def offer(self, number: int) -> Offer:
        (manifest,) = [one for _, one in self.versions.values() if one.version == number]
        return offer_of(manifest, [Source("test", "", "x")])

    def reaches(self, source: Source, staging: Staging | None) -> bool:
        return True

    def manifest(self, source: Source, label: str) -> bytes:
        return encode_manifest(self.versions[label][1])

    def fetch(self, source: Source, label: str, staging: Staging) -> None:
        image, manifest = self.versions[label]
        data = memoryview(image.readable())
        stop = self.break_at.pop(0) if self.break_at else len(manifest.chunks)
        for number in staging.missing():
            if number == stop:
                raise SourceError(f"broke off at chunk {number}")
            chunk = manifest.chunks[number]
            staging.keep(number, self._parts(data[chunk.offset : chunk.offset + chunk.size]))
            self.fetched.append(number)

    def _parts(self, data: memoryview) -> Iterator[memoryview]:
        self.begun.set()
        assert self.gate.wait(10)
        yield data


class Engine:
    """An engine that remembers what it was given whole, and refuses what the test says."""

    def __init__(self) -> None:
        self.served: list[int] = []
        self.refuse: list[Exception] = []
        self.changed = asyncio.Event()

    async def serve(self, held: Held) -> None:
        if self.refuse:
            raise self.refuse.pop(0)
        assert held.image.sealed
        assert bytes(held.image.readable()) == bytes(version(held.manifest.version)[0].readable())
        self.served.append(held.manifest.version)
        self.changed.set()

    async def until(self, number: int) -> None:
        async with asyncio.timeout(10):
            while number not in self.served:
                self.changed.clear()
                await self.changed.wait()


class Registry:
    """What the test says that Redis says."""

    def __init__(self) -> None:
        self.standings: dict[int, Standing] = {}
        self.others: list[Source] = []

    async def standing(self, offer: Offer) -> Standing:
        return self.standings.get(offer.version, "committed")

    async def siblings(self, label: str) -> list[Source]:
        return self.others


class Scene:
    """An agent at work with all that it deals with."""

    def __init__(self, medium: Medium, lag: int) -> None:
        self.medium, self.engine, self.registry = medium, Engine(), Registry()
        self.log: list[str] = []
        self.holder = Holder("127.0.0.1")
        self.agent = Agent(
            self.holder,
            [medium, Peer(5)],
            engine=self.engine,
            registry=self.registry,
            lag=lag,
            log=self.log.append,
        )
        self.task = asyncio.create_task(self.agent.run())

    async def says(self, text: str) -> None:
        """Waits until the agent has logged a line with this text."""
        async with asyncio.timeout(10):
            while not any(text in line for line in self.log):
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.holder.close()


Make = Callable[..., Scene]


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    monkeypatch.setattr(module, "COMMIT_LOOK_S", 0.01)
    made: list[Scene] = []

    def make(*numbers: int, lag: int = 1) -> Scene:
        made.append(Scene(Medium(*numbers), lag))
        return made[-1]

    yield make
    for one in made:
        one.medium.gate.set()
        await one.close()


async def test_a_version_is_staged_held_and_served(scene: Make) -> None:
    run = scene(3)
    run.agent.hear(run.medium.offer(3))
    await run.engine.until(3)
    await asyncio.sleep(0)
    assert run.agent.state == "serving 3"
    assert run.agent.way == "test"
    assert [label.partition(":")[0] for label in run.holder.labels()] == ["3"]


async def test_memory_for_the_next_version_is_taken_before_it_is_there(scene: Make) -> None:
    run = scene(3, 4)
    run.agent.hear(run.medium.offer(3))
    size, reserve = version(3)[1].size, run.holder.reserve
    async with asyncio.timeout(10):
        while reserve.size != size:
            await asyncio.sleep(0.01)
    run.medium.gate.clear()
    run.medium.begun.clear()
    run.agent.hear(run.medium.offer(4))
    assert await asyncio.to_thread(run.medium.begun.wait, 10)
    assert reserve.size == 0, "it goes into that"
    run.medium.gate.set()
    await run.engine.until(4)


async def test_the_newest_version_wins_and_an_older_offer_is_not_heard(scene: Make) -> None:
    run = scene(3, 4, 5)
    for number in (3, 5, 4):
        run.agent.hear(run.medium.offer(number))
    await run.engine.until(5)
    assert run.engine.served == [5]


@pytest.mark.parametrize(("lag", "served"), [(2, [3, 5]), (1, [5])])
async def test_a_pull_under_way_is_finished_while_it_is_of_use(
    scene: Make, lag: int, served: list[int]
) -> None:
    """Else a pull that takes longer than a step would never end; but one that is too old is left at once."""
    run = scene(3, 5, lag=lag)
    run.medium.gate.clear()
    run.agent.hear(run.medium.offer(3))
    assert await asyncio.to_thread(run.medium.begun.wait, 10)
    run.agent.hear(run.medium.offer(5))
    run.medium.gate.set()
    await run.engine.until(5)
    assert run.engine.served == served
    if lag == 1:
        assert any("version 3 is of no use by now" in line for line in run.log)


@pytest.mark.parametrize("chunk", range(7))
async def test_row_16_a_push_that_dies_at_a_chunk_leaves_the_engine_alone(scene: Make, chunk: int) -> None:
    """The engine is given nothing until all is here, and what was verified is not pulled again."""
    run = scene(3, 4)
    run.agent.hear(run.medium.offer(3))
    await run.engine.until(3)
    run.medium.fetched.clear()
    run.medium.break_at = [chunk]
    run.agent.hear(run.medium.offer(4))
    await run.says(f"version 4 cannot be staged: broke off at chunk {chunk}")
    await run.engine.until(4)
    assert run.engine.served == [3, 4]
    assert run.medium.fetched == list(range(7))


async def test_a_sibling_gives_what_the_offered_sources_do_not(scene: Make) -> None:
    """Row 13: cut off from the learner, but not from everybody."""
    run, (image, manifest) = scene(4), version(4)
    other = Holder("127.0.0.1")
    other.keep(manifest, image)
    run.registry.others = [source for source in other.sources(manifest.label) if source.kind == "peer"]
    run.medium.break_at = [2]
    run.agent.hear(run.medium.offer(4))
    await run.engine.until(4)
    assert run.agent.way == "peer"
    assert other.served_bytes == sum(chunk.size for chunk in manifest.chunks[2:])
    other.close()


async def test_nothing_is_applied_before_it_is_committed(scene: Make) -> None:
    run = scene(3)
    run.registry.standings[3] = "open"
    run.agent.hear(run.medium.offer(3))
    async with asyncio.timeout(10):
        while run.agent.state != "staged 3":
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert run.engine.served == []
    run.registry.standings[3] = "committed"
    await run.engine.until(3)


async def test_a_stage_without_commit_is_forgotten_when_another_learner_has_come(scene: Make) -> None:
    run = scene(3, 4)
    run.registry.standings[3] = "void"
    run.agent.hear(run.medium.offer(3))
    await run.says("version 3 of epoch 1 was never committed")
    await asyncio.sleep(0.2)
    assert run.engine.served == []
    assert (len(run.log), run.agent.staged_versions) == (1, 1), "said once, and not tried again"
    run.registry.standings[3] = "committed"
    again = run.medium.offer(3)
    run.agent.hear(replace(again, epoch=2))
    await run.engine.until(3)


async def test_a_learner_that_was_replaced_is_not_heard(scene: Make) -> None:
    run = scene(3, 4)
    old = run.medium.offer(4)
    new = run.medium.offer(3)
    run.agent.hear(replace(new, epoch=2))
    run.agent.hear(old)
    await run.engine.until(3)
    await asyncio.sleep(0.1)
    assert run.engine.served == [3]


async def test_after_a_fork_versions_go_back(scene: Make) -> None:
    """A lineage that was left counts for nothing, however new its versions, also in the middle of a pull."""
    run = scene(3, 4, 5, lag=9)
    run.agent.hear(run.medium.offer(4))
    await run.engine.until(4)
    run.medium.begun.clear()
    run.medium.gate.clear()
    run.agent.hear(run.medium.offer(5))
    assert await asyncio.to_thread(run.medium.begun.wait, 10)
    run.agent.hear(replace(run.medium.offer(3), lineage=1))
    run.medium.gate.set()
    await run.engine.until(3)
    assert run.engine.served == [4, 3]


async def test_an_open_version_that_is_too_old_makes_room(scene: Make) -> None:
    run = scene(3, 5)
    run.registry.standings[3] = "open"
    run.agent.hear(run.medium.offer(3))
    async with asyncio.timeout(10):
        while run.agent.state != "staged 3":
            await asyncio.sleep(0.01)
    run.agent.hear(run.medium.offer(5))
    await run.engine.until(5)
    assert run.engine.served == [5]


async def test_a_refused_version_is_tried_again_and_the_old_one_is_served(scene: Make) -> None:
    run = scene(3)
    run.engine.refuse = [Untouched("busy"), Untouched("busy")]
    run.agent.hear(run.medium.offer(3))
    await run.says("version 3 is refused, the engine serves the old one: busy")
    await run.engine.until(3)
    assert len(run.log) == 1, "the same words are said once"


class OnCard(Medium):
    """Has versions in GPU memory, which only the engine can read."""

    kind = "card"

    def offer(self, number: int) -> Offer:
        (manifest,) = [one for _, one in self.versions.values() if one.version == number]
        return offer_of(manifest, [Source("card", "", "x"), Source("test", "", "x")])

    def fetch(self, source: Source, label: str, staging: Staging) -> None:
        staging.manifest = replace(
            staging.manifest, chunks=[replace(chunk, sum=1) for chunk in staging.manifest.chunks]
        )
        staging.put(Place("/nowhere"))


async def test_what_an_engine_cannot_read_on_a_gpu_comes_another_way(scene: Make) -> None:
    run, card = scene(3, 4), OnCard(3, 4)
    run.agent._transports = [card, run.medium]
    ways = []

    async def serve(held: Held) -> None:
        ways.append((held.manifest.version, held.place))
        if held.place is not None and held.manifest.version == 3:
            raise Untouched("the card is not visible")
        run.engine.served.append(held.manifest.version)
        run.engine.changed.set()

    run.engine.serve = serve  # type: ignore[method-assign]
    run.agent.hear(card.offer(3))
    await run.engine.until(3)
    run.agent.hear(card.offer(4))
    await run.engine.until(4)
    assert ways == [(3, Place("/nowhere")), (3, None), (4, Place("/nowhere"))]
    assert run.agent.way == "card"


async def test_an_engine_whose_weights_are_unknown_ends_the_agent(scene: Make) -> None:
    run = scene(3)
    run.engine.refuse = [RuntimeError("half loaded")]
    run.agent.hear(run.medium.offer(3))
    with pytest.raises(RuntimeError, match="half loaded"):
        await asyncio.wait_for(run.task, 10)


async def test_a_manifest_that_is_not_the_one_offered_is_refused(scene: Make) -> None:
    run = scene(3)
    offer = run.medium.offer(3)
    run.agent.hear(replace(offer, manifest="00"))
    await run.says("ask another source")
    assert run.engine.served == []
