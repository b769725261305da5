"""Weights from GPU to GPU, 1.7 B parameters: what arrives, what is refused, what a death leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.gpu.shapes import exported
from weightsync.cuda import driver, visible_cards
from weightsync.errors import SourceError
from weightsync.guard import Contents, lease
from weightsync.holder import Holder
from weightsync.image import Image, write_image
from weightsync.manifest import CHUNK_BYTES, Manifest, digest_of, encode_manifest
from weightsync.on_gpu import OnGpu
from weightsync.protocol import Source
from weightsync.slot import Slot, opened
from weightsync.staging import Staging
from weightsync.ticket import Report, Ticket, hand_in, reports
from weightsync.transports import nccl
from weightsync.transports import round as rounds
from weightsync.transports.cuda_ipc import CudaIpc

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
two_gpus = pytest.mark.skipif(len(visible_cards()) < 2, reason="needs two CUDA GPUs")
Version = tuple[Image, Manifest]


def make(number: int) -> Version:
    """A version's image and manifest; the number is its seed."""
    weights = exported(number)
    return write_image(Manifest.of(number, weights), weights)


@pytest.fixture(scope="module")
def versions() -> list[Version]:
    return [make(number) for number in range(3)]


@pytest.fixture
def on_gpu() -> Iterator[OnGpu]:
    made = OnGpu(0, print)
    yield made
    made.close()


def process(*arguments: str, cards: str | None = None) -> subprocess.Popen[str]:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": cards} if cards else {})
    argv = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(other: subprocess.Popen[str]) -> str:
    assert other.stdout is not None
    return other.stdout.readline().strip()


class Engine:
    """An engine's process, and its tickets."""

    def __init__(self, folder: Path, card: int) -> None:
        self._folder, self._process = folder, process("tests.gpu.engine", str(folder), str(card))
        self._number = 0
        assert said(self._process) == "ready"

    def load(self, manifest: Manifest, path: str, *, gpu: bool, holds: int) -> tuple[Report, bool]:
        """The report, and whether the engine then holds the version of that number exactly."""
        self._number += 1
        hand_in(self._folder, Ticket(self._number, path, encode_manifest(manifest), check=True, gpu=gpu))
        assert self._process.stdin is not None
        self._process.stdin.write(f"{holds}\n")
        self._process.stdin.flush()
        exact = said(self._process) == "True"
        (report,) = reports(self._folder, self._number)
        return report, exact

    def close(self) -> None:
        self._process.communicate()


@pytest.mark.parametrize("card", [0, pytest.param(1, marks=two_gpus)])
def test_an_engine_takes_versions_from_the_learners_gpu(
    card: int, tmp_path: Path, versions: list[Version], on_gpu: OnGpu
) -> None:
    """By names, by plan, from host memory in between; a damaged one is refused before anything is touched."""
    engine = Engine(tmp_path, card)
    ways = []
    for number in (0, 1, 2):
        image, manifest = versions[number]
        summed = on_gpu.take(manifest, image)
        assert on_gpu.slot is not None
        report, exact = engine.load(summed, on_gpu.slot.guard.path, gpu=True, holds=number)
        assert (report.problem, exact) == ("", True)
        ways.append(report.way)
        print(f"\ncard {card}: cuda_ipc by {report.way}, {report.copies} copies: {report.seconds:.4f} s")
    assert ways == ["names", "plan", "plan"]
    image, manifest = versions[0]
    report, exact = engine.load(manifest, image.path, gpu=False, holds=0)
    assert (report.problem, report.way, exact) == ("", "plan", True)
    print(f"card {card}: from host memory by plan: {report.seconds:.4f} s")
    summed = on_gpu.take(manifest, image)
    assert on_gpu.slot is not None
    with on_gpu.slot.filling(manifest.label, 1.0) as room:
        room[40 * CHUNK_BYTES + 5] ^= 1
        torch.cuda.synchronize()
    report, exact = engine.load(summed, on_gpu.slot.guard.path, gpu=True, holds=0)
    assert "chunk 40 of" in report.problem
    assert (report.touched, exact) == (False, True)
    engine.close()


def test_a_version_that_comes_back_wrong_is_not_offered(versions: list[Version]) -> None:
    image, manifest = versions[0]
    said = list[str]()
    on_gpu = OnGpu(0, said.append)
    for number in (0, 41, len(manifest.chunks) - 1):
        chunks = [*manifest.chunks]
        chunks[number] = msgspec.structs.replace(chunks[number], digest="00")
        wrong = msgspec.structs.replace(manifest, chunks=chunks)
        assert on_gpu.take(wrong, image) is wrong
        assert not on_gpu.holds(manifest.label)
        assert f"chunk {number}: got digest" in said[-1]
        assert "back from GPU 0, expected 00" in said[-1]
    assert on_gpu.holds(on_gpu.take(manifest, image).label)
    on_gpu.close()


OWNER = """
import sys, time, torch
from weightsync.slot import Slot
slot = Slot(0, 1 << 30)
with slot.filling("7:aa", 1.0) as room:
    room.fill_(7)
    torch.cuda.synchronize()
print(slot.guard.path, flush=True)
time.sleep(100)
"""


def test_a_learner_that_is_killed_while_it_is_read_taints_who_reads() -> None:
    """CUDA does not say what becomes of its memory; the guard says that it has ended."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    guard, manifest = said(owner), Manifest(7, "aa", [], size=1 << 30)

    def read() -> None:
        with opened(guard, manifest) as memory:
            assert bool((memory == 7).all())
            owner.kill()
            owner.wait()
            print(f"\nafter the owner's death its memory reads as before: {bool((memory == 7).all())}")

    with pytest.raises(SourceError, match="ended while it was read"):
        read()
    assert bool(torch.ones(8, device="cuda").all()), "the reader's GPU goes on"


def test_a_slot_is_not_written_or_freed_while_it_is_open() -> None:
    slot = Slot(0, 1 << 20)
    before = driver().free_bytes(0)
    with slot.filling("7:aa", 1.0) as room:
        room.fill_(7)
        torch.cuda.synchronize()
    with lease(slot.guard.path, "7:aa") as held:
        assert held.contents == Contents("7:aa", slot.card, slot._handle, 1 << 20)
        with pytest.raises(SourceError, match="still being read"), slot.filling("8:bb", 0.1):
            pytest.fail("it is being read")
    slot.close(1.0)
    assert driver().free_bytes(0) > before


AGENT = """
import sys, msgspec
from weightsync.cuda import visible_cards
from weightsync.manifest import decode_manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.errors import SourceError
from weightsync.transports import nccl, round as rounds
way = nccl.Nccl(float(sys.argv[1]), sys.argv[2:] or visible_cards()[:1])
for line in sys.stdin:
    source, label, digest, dies = msgspec.json.decode(line, type=tuple[Source, str, str, bool])
    if dies:
        rounds.joined("nccl", rounds.store_of(source, rounds.timedelta(seconds=5)), label)
        print("joined", flush=True)
        continue
    staging = Staging(decode_manifest(way.manifest(source, label), digest), None, lambda: None)
    try:
        way.fetch(source, label, staging)
        print(staging.finish().guard, flush=True)
    except SourceError as error:
        print(f"SourceError: {error}", flush=True)
"""


class Agent:
    """An agent's process on the second GPU; with a name on the first, for NCCL on a host of that name, to
    which it goes by sockets."""

    def __init__(self, timeout_s: float, name: str = "") -> None:
        argv = [sys.executable, "-c", AGENT, str(timeout_s), *([name] if name else [])]
        environment = os.environ | ({"NCCL_HOSTID": name} if name else {"CUDA_VISIBLE_DEVICES": "1"})
        self._process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def fetch(self, source: Source, manifest: Manifest, *, dies: bool = False) -> None:
        """Has it take part, or come and then do nothing."""
        sealed = digest_of(encode_manifest(manifest))
        request = msgspec.json.encode((source, manifest.label, sealed, dies)).decode()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        return said(self._process)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._process.communicate()


cards = pytest.mark.parametrize("card", [0, pytest.param(1, marks=two_gpus)])


def agent_on(card: int, timeout_s: float) -> Agent:
    """Beside the learner, by sockets, or on the second GPU."""
    return Agent(timeout_s, "" if card else "another")


@cards
def test_a_broadcast_reaches_an_agents_gpu_and_its_engine(
    card: int, tmp_path: Path, versions: list[Version], on_gpu: OnGpu
) -> None:
    holder, agent, engine = Holder("127.0.0.1"), agent_on(card, TIMEOUT_S), Engine(tmp_path, card)
    groups = set()
    for number in (0, 1):
        image, manifest = versions[number]
        summed = on_gpu.take(manifest, image)
        # A copy: the holder closes what it forgets, and other tests go on with the image.
        holder.keep(summed, Image(os.dup(image.descriptor), image.size))
        assert on_gpu.slot is not None
        pull = holder.sources(summed.label)[-1]
        one = nccl.Round("127.0.0.1", on_gpu.slot, summed, pull, TIMEOUT_S, on_gpu.group)
        began = time.monotonic()
        agent.fetch(one.source, summed)
        guard = agent.answer()
        print(f"\nnccl: version {number} staged and verified in {time.monotonic() - began:.3f} s")
        one.join(TIMEOUT_S)
        assert one.took == 1
        groups.add(on_gpu.group.identity)
        report, exact = engine.load(summed, guard, gpu=True, holds=number)
        assert (report.problem, exact) == ("", True)
        print(f"nccl: applied by {report.way}: {report.seconds:.4f} s")
    assert len(groups) == 1, "the second version goes through the group of the first"
    agent.close()
    engine.close()
    holder.close()


def test_the_group_is_of_those_that_come(
    versions: list[Version], on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One agent, a second one beside it, both again, one of them killed, and the other alone again."""
    image, manifest = versions[0]
    summed, holder = on_gpu.take(manifest, image), Holder("127.0.0.1")
    holder.keep(summed, Image(os.dup(image.descriptor), image.size))
    assert on_gpu.slot is not None
    pull, groups = holder.sources(summed.label)[-1], list[bytes]()
    first, second = Agent(TIMEOUT_S, "first"), Agent(TIMEOUT_S, "second")
    for agents in ([first], [first, second], [second, first], [first], [first]):
        if len(groups) == 3:
            second.kill()
        monkeypatch.setattr(rounds, "GATHER_S", 5.0 if len(agents) > 1 else 0.1)  # its first takes a slot
        one = nccl.Round("127.0.0.1", on_gpu.slot, summed, pull, TIMEOUT_S, on_gpu.group)
        began = time.monotonic()
        for agent in agents:
            agent.fetch(one.source, summed)
        answers = [agent.answer() for agent in agents]
        assert all(answer.startswith("/proc/") for answer in answers), answers
        one.join(TIMEOUT_S)
        assert one.took == len(agents)
        groups.append(on_gpu.group.identity)
        print(f"\nnccl: to {len(agents)} in {time.monotonic() - began:.3f} s")
    alone, both, again, left, still = groups
    assert both == again
    assert left == still
    assert len({alone, both, left}) == 3
    first.close()
    holder.close()


@cards
def test_an_agent_that_does_not_come_costs_the_learner_a_timeout_and_nothing_else(
    card: int, versions: list[Version], on_gpu: OnGpu
) -> None:
    image, manifest = versions[0]
    summed, holder, agent = on_gpu.take(manifest, image), Holder("127.0.0.1"), agent_on(card, 2.0)
    holder.keep(summed, Image(os.dup(image.descriptor), image.size))
    assert on_gpu.slot is not None
    pull = holder.sources(summed.label)[-1]
    lost = nccl.Round("127.0.0.1", on_gpu.slot, summed, pull, 2.0, on_gpu.group)
    began = time.monotonic()
    agent.fetch(lost.source, summed, dies=True)
    assert agent.answer() == "joined"
    lost.join(20.0)
    assert lost.took == 0
    print(f"\nnccl: a round with one that is gone ended after {time.monotonic() - began:.1f} s (timeout 2 s)")
    again = nccl.Round("127.0.0.1", on_gpu.slot, summed, pull, TIMEOUT_S, on_gpu.group)
    agent.fetch(again.source, summed)
    assert agent.answer().startswith("/proc/")
    again.join(TIMEOUT_S)
    assert again.took == 1
    agent.close()
    holder.close()


def test_a_learner_without_room_offers_its_other_ways() -> None:
    told: list[str] = []
    on_gpu = OnGpu(0, told.append)
    manifest = Manifest(1, "aa", [], size=1 << 50)
    assert on_gpu.take(manifest, Image.allocate(0)) is manifest
    assert not on_gpu.holds("1:aa")
    assert "GB are free" in told[0]


def test_the_agent_sees_the_card_that_the_slot_is_on() -> None:
    slot = Slot(0, 1 << 20)
    with slot.filling("7:aa", 1.0):
        torch.cuda.synchronize()
    source = Source("cuda_ipc", "here", f"{slot.guard.path} x")
    with pytest.raises(SourceError, match="has no sums"):  # it got as far as that
        CudaIpc(visible_cards()).fetch(source, "7:aa", Staging(make_small(), None, lambda: None))
    slot.close(1.0)


def make_small() -> Manifest:
    """A manifest with a chunk that has no sum."""
    weights = {"a": torch.ones(4)}
    return write_image(Manifest.of(7, weights), weights)[1]
