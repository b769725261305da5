"""Ways over GPU memory, as far as no GPU is needed: who takes which, and what is refused and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
from msgspec.structs import replace
from torch.distributed import HashStore, TCPStore

from tests.unit.weightsync.versions import holding, version
from weightsync import communicator
from weightsync import on_gpu as module
from weightsync.config import WeightSyncConfig
from weightsync.cuda import driver, visible_cards
from weightsync.errors import NoCuda, SourceError
from weightsync.guard import Contents, Guard, Place
from weightsync.holder import Held, Holder
from weightsync.image import Image
from weightsync.manifest import Manifest
from weightsync.on_gpu import WAIT_S, open_on_gpu
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.choice import transports
from weightsync.transports.cuda_ipc import CudaIpc, source_of
from weightsync.transports.nccl import Nccl, chosen, claim

without_gpu = pytest.mark.skipif(bool(visible_cards()), reason="there is a GPU")


def summed(manifest: Manifest) -> Manifest:
    """As if a GPU had added up every chunk."""
    return replace(manifest, chunks=[replace(chunk, sum=0) for chunk in manifest.chunks])


@pytest.fixture
def slot() -> Iterator[Callable[[Manifest], Guard]]:
    """The guard of a slot that holds a version on the card "one"; there is no memory behind it."""
    guard = Guard()

    def hold(manifest: Manifest) -> Guard:
        with guard.writing(1.0) as put:
            put(Contents(manifest.label, "one", bytes(64), manifest.size))
        return guard

    yield hold
    guard.close()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("auto", ["cuda_ipc", "shm", "delta", "peer", "disk"]),
        ("cuda_ipc", ["cuda_ipc", "shm", "peer"]),
        ("nccl", ["nccl", "cuda_ipc", "shm", "peer"]),
        ("peer", ["peer"]),
    ],
)
def test_where_there_is_a_gpu_its_ways_come_first(chosen: str, expected: list[str]) -> None:
    config = WeightSyncConfig(transport=chosen, gpu=chosen != "peer")  # type: ignore[arg-type]
    assert [transport.kind for transport in transports(config, ["one"])] == expected


@pytest.mark.parametrize("chosen", ["cuda_ipc", "nccl"])
def test_where_there_is_none_they_are_refused_by_name(chosen: str) -> None:
    with pytest.raises(ValueError, match=r"set weightsync.gpu = true"):
        WeightSyncConfig(transport=chosen)  # type: ignore[arg-type]
    config = WeightSyncConfig(transport=chosen, gpu=chosen != "peer")  # type: ignore[arg-type]
    with pytest.raises(NoCuda, match=f'got "{chosen}", but this process sees no CUDA GPU'):
        transports(config, [])


@without_gpu
def test_without_a_driver_it_says_so() -> None:
    with pytest.raises(NoCuda, match="no CUDA"):
        driver()
    with pytest.raises(NoCuda, match=r"weightsync.gpu: got true, but the learner has no GPU: no CUDA"):
        open_on_gpu(print)


def test_readers_are_waited_for_once_and_then_the_version_comes_by_its_other_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, manifest = version(4)
    busy = [None, SourceError("still being read"), RuntimeError("no memory"), None, None]
    waited: list[float] = []
    told: list[str] = []

    def fill(slot: object, manifest: Manifest, image: Image, timeout_s: float) -> Manifest:
        waited.append(timeout_s)
        if error := busy.pop(0):
            raise error
        return summed(manifest)

    monkeypatch.setattr(module, "driver", object)
    monkeypatch.setattr(module, "Slot", lambda ordinal, size: SimpleNamespace(size=size))
    monkeypatch.setattr(module, "fill", fill)
    on_gpu = module.OnGpu(0, told.append)
    found = []
    for _ in range(5):
        taken = on_gpu.take(manifest, image)
        found.append((taken.chunks[0].sum is not None, on_gpu.holds(manifest.label)))
    assert found == [(True, True), (False, False), (False, False), (True, True), (True, True)]
    assert waited == [WAIT_S, WAIT_S, 0.0, 0.0, WAIT_S]
    assert [line.partition(": ")[2] for line in told] == [
        "version 4 is not offered from the GPU: still being read",
        "version 4 is not offered from the GPU: no memory",
    ]


def test_the_agent_leaves_the_version_to_its_engine(slot: Callable[[Manifest], Guard]) -> None:
    image, manifest = version(4)
    with holding(image, summed(manifest)) as (_, held):
        source, staging = source_of(slot(manifest), held.memory), Staging(held.manifest, None, lambda: None)
        way = CudaIpc(["two", "one"])
        assert way.manifest(source, manifest.label) == held.encoded
        assert way.reaches(source, None)
        assert way.reaches(source, staging)
        assert not way.reaches(replace(source, host="another"), staging)
        way.fetch(source, manifest.label, staging)
        assert not way.reaches(source, staging), "it is here already"
        assert staging.finish() == Place(source.address.partition(" ")[0])


def test_a_card_that_the_engine_cannot_see_is_named(slot: Callable[[Manifest], Guard]) -> None:
    image, manifest = version(4)
    with holding(image, summed(manifest)) as (_, held):
        source, staging = source_of(slot(manifest), held.memory), Staging(held.manifest, None, lambda: None)
        with pytest.raises(SourceError, match="is on GPU one, this process sees two, three"):
            CudaIpc(["two", "three"]).fetch(source, manifest.label, staging)
        assert staging.is_empty


def test_a_version_that_was_replaced_on_the_gpu_is_no_source(slot: Callable[[Manifest], Guard]) -> None:
    image, manifest = version(4)
    with holding(image, summed(manifest)) as (_, held):
        source, staging = source_of(slot(manifest), held.memory), Staging(held.manifest, None, lambda: None)
        slot(version(5)[1])
        with pytest.raises(SourceError, match=r"holds 5:.*expected 4:"):
            CudaIpc(["one"]).fetch(source, manifest.label, staging)


def test_without_sums_nothing_on_a_gpu_is_taken(slot: Callable[[Manifest], Guard]) -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (_, held):
        source, staging = source_of(slot(manifest), held.memory), Staging(manifest, None, lambda: None)
        with pytest.raises(SourceError, match="has no sums that a GPU could verify"):
            CudaIpc(["one"]).fetch(source, manifest.label, staging)
        assert staging.is_empty


def test_what_lies_on_a_gpu_only_is_served_to_nobody() -> None:
    holder, (_, manifest) = Holder("127.0.0.1"), version(4)
    held = holder.keep(summed(manifest), Place("/proc/1/fd/9"))
    assert (held.path, held.image) == ("/proc/1/fd/9", None)
    assert holder.sources(manifest.label) == []
    assert holder.held_bytes() == 0
    assert holder.answer(f"/{manifest.label}/manifest") is not None
    assert holder.answer(f"/{manifest.label}/data") is None
    holder.close()


def test_what_lies_in_memory_says_where() -> None:
    image, manifest = version(4)
    held = Held(manifest, image)
    assert (held.path, held.place) == (image.path, None)
    held.close()
    assert isinstance(held.image, Image)
    assert held.image.descriptor == -1


def test_a_round_takes_one_rank_a_card() -> None:
    store = HashStore()
    store.set("card", "one")
    claim(store, "two")
    claim(store, "three")
    with pytest.raises(SourceError, match="GPU one is the learner's as well"):
        claim(store, "one")
    with pytest.raises(SourceError, match="GPU two is another agent's as well"):
        claim(store, "two")


def test_who_shares_the_learners_card_leaves_the_round_at_once_and_is_not_counted() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store.set("token/card", "one")
    source = Source("nccl", f"127.0.0.1:{store.port}", "http://127.0.0.1:1", "token")
    staging = Staging(summed(version(4)[1]), None, lambda: None)
    way = Nccl(5.0, ["one"])
    assert way.reaches(source, staging)
    with pytest.raises(SourceError, match="NCCL takes one rank a GPU"):
        way.fetch(source, "4:x", staging)
    assert store.add("token/joined", 0) == 0


class Ranks:
    """In place of a communicator."""

    made: ClassVar[list[Ranks]] = []

    def __init__(self, identity: bytes, rank: int, size: int, ordinal: int, timeout_s: float) -> None:
        if identity == b"bad":
            raise SourceError("nobody came")
        self.closed = False
        self.made.append(self)

    @staticmethod
    def identity() -> bytes:
        return b"new"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    monkeypatch.setattr(communicator, "Communicator", Ranks)
    monkeypatch.setattr(Ranks, "made", [])
    return Ranks.made


def test_a_group_is_kept_until_it_fails_or_another_is_wanted(ranks: list[Ranks]) -> None:
    group = communicator.Group()
    for rank in (1, 2):
        with group.of(b"one", rank, 3, 0, 1.0) as first:
            assert first is ranks[0]
            group.close()
            assert not ranks[0].closed, "it is in use"
    assert (len(ranks), group.identity, group.size) == (1, b"one", 3)
    with group.of(b"two", 1, 2, 0, 1.0) as second:
        assert ranks[0].closed
        assert second is ranks[1]
    with pytest.raises(SourceError, match="late"), group.of(b"two", 1, 2, 0, 1.0):
        raise SourceError("late")
    assert ranks[1].closed
    assert (group.identity, group.size) == (b"", 0)
    with group.of(b"two", 1, 2, 0, 1.0) as third:
        assert third is ranks[2], "what failed is not taken again"
    with pytest.raises(SourceError, match="nobody came"), group.of(b"bad", 1, 2, 0, 1.0):
        pytest.fail("there is none")
    assert (ranks[2].closed, group.identity) == (True, b"")
    with group.of(b"four", 1, 2, 0, 1.0):
        pass
    group.close()
    assert (ranks[3].closed, group.size) == (True, 0)


@pytest.mark.parametrize(
    ("size", "held", "expected"),
    [
        (3, [b"one", b"one"], b"one"),
        (3, [b"one", b""], b"new"),
        (3, [b"one", b"two"], b"new"),
        (2, [b"one"], b"new"),
        (4, [b"one", b"one", b"one"], b"new"),
    ],
)
def test_a_group_goes_on_with_all_of_its_members_and_nobody_else(
    ranks: list[Ranks], size: int, held: list[bytes], expected: bytes
) -> None:
    store, group = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False), communicator.Group()
    with group.of(b"one", 0, 3, 0, 1.0):
        pass
    for rank, identity in enumerate(held, 1):
        store.set(f"has:{rank}", identity.hex())
    assert chosen(store, size, group) == expected
    if size == 2:  # a learner that has none, as a restarted one
        store.set("has:1", "")
        assert chosen(store, 2, communicator.Group()) == b"new"


def test_a_learner_that_is_gone_is_a_source_that_is_gone() -> None:
    source = Source("nccl", "127.0.0.1:1", "http://127.0.0.1:1", "token")
    with pytest.raises(SourceError, match=r"nccl: 127.0.0.1:1: .*is gone"):
        Nccl(0.3, ["one"]).fetch(source, "4:x", Staging(version(4)[1], None, lambda: None))
