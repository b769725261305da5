"""Each transport brings exactly the bytes; damage is found where it is; what was verified stays."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.unit.weightsync.versions import CHUNK, damaged, holding, tensors, version
from weightsync.config import WeightSyncConfig
from weightsync.errors import SourceError, Superseded
from weightsync.holder import Holder
from weightsync.image import Image
from weightsync.manifest import Manifest, decode_manifest, digest_of, encode_manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports.base import Transport, this_host
from weightsync.transports.choice import transports
from weightsync.transports.delta import Delta, decode, deltas, encode
from weightsync.transports.disk import Disk, save
from weightsync.transports.peer import Peer, answers, connected
from weightsync.transports.shm import Shm


def never() -> None:
    """Goes on for ever."""


@pytest.fixture(params=["shm", "peer", "disk", "delta"])
def way(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Transport, Source, Manifest, Image]]:
    """A transport, a source of version 4 for it, that version's manifest, and the image of version 3."""
    parent, before = version(3)
    image, manifest = version(4, parent=before.digest)
    with holding(image, manifest, [encode(*pair, 1) for pair in pairs(parent, image, manifest)]) as (
        holder,
        _,
    ):
        found = {source.kind: source for source in holder.sources(manifest.label)}
        found["disk"] = save(tmp_path, manifest, image, 2)
        made: dict[str, Transport] = {"shm": Shm(), "peer": Peer(5), "disk": Disk(), "delta": Delta(5)}
        yield made[request.param], found[request.param], manifest, parent


def pairs(old: Image, new: Image, manifest: Manifest) -> list[tuple[memoryview, memoryview]]:
    """The chunks of two images."""
    one, other = memoryview(old.readable()), memoryview(new.readable())
    places = [slice(chunk.offset, chunk.offset + chunk.size) for chunk in manifest.chunks]
    return [(one[place], other[place]) for place in places]


def test_the_bytes_of_a_version_arrive(way: tuple[Transport, Source, Manifest, Image]) -> None:
    transport, source, manifest, parent = way
    encoded = transport.manifest(source, manifest.label)
    assert decode_manifest(encoded, digest_of(encode_manifest(manifest))) == manifest
    staging = Staging(manifest, parent, never)
    assert transport.reaches(source, staging)
    transport.fetch(source, manifest.label, staging)
    image = staging.finish()
    assert image.sealed
    assert bytes(image.readable()) == bytes(version(4)[0].readable())


@pytest.mark.parametrize("number", range(7))
def test_a_damaged_chunk_is_named_and_the_others_stay(number: int, tmp_path: Path) -> None:
    image, manifest = version(4)
    bad = damaged(image, number * CHUNK + 7)
    with holding(bad, manifest) as (holder, _):
        for kind, transport in (("peer", Peer(5, 1)), ("disk", Disk()), ("shm", Shm())):
            sources = {one.kind: one for one in holder.sources(manifest.label)}
            sources["disk"] = save(tmp_path / kind, manifest, bad, 2)
            staging = Staging(manifest, None, never)
            with pytest.raises(SourceError, match=f"chunk {number} of {len(manifest.chunks)}"):
                transport.fetch(sources[kind], manifest.label, staging)
            assert staging.missing() == list(range(0 if kind == "shm" else number, 7))
            staging.close()


def test_a_pull_goes_on_at_another_holder_where_it_broke_off() -> None:
    image, manifest = version(4)
    with holding(damaged(image, 5 * CHUNK), manifest) as (first, _), holding(image, manifest) as (second, _):
        staging = Staging(manifest, None, never)
        with pytest.raises(SourceError):
            Peer(5, 1).fetch(first.sources(manifest.label)[-1], manifest.label, staging)
        Peer(5, 1).fetch(second.sources(manifest.label)[-1], manifest.label, staging)
        assert bytes(staging.finish().readable()) == bytes(image.readable())
        missing = sum(chunk.size for chunk in manifest.chunks[5:])
        assert second.served_bytes == missing, "only what was missing is pulled"


def test_what_is_missing_in_a_row_is_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = version(4)
    asked, send = list[tuple[int, int]](), Holder.send

    def noted(holder: Holder, connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
        asked.append((first, count))
        send(holder, connection, image, first, count)

    with holding(damaged(image, 2 * CHUNK), manifest) as (first, _), holding(image, manifest) as (second, _):
        staging = Staging(manifest, None, never)
        with pytest.raises(SourceError):
            Peer(5, 1).fetch(first.sources(manifest.label)[-1], manifest.label, staging)
        chunk = manifest.chunks[3]
        staging.keep(3, [memoryview(image.readable())[chunk.offset : chunk.offset + chunk.size]])
        assert staging.missing() == [2, 4, 5, 6]
        monkeypatch.setattr(Holder, "send", noted)
        Peer(5, 1).fetch(second.sources(manifest.label)[-1], manifest.label, staging)
    assert asked == [(2 * CHUNK, CHUNK), (4 * CHUNK, manifest.size - 4 * CHUNK)]


def test_connections_have_a_part_each_and_what_one_brought_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = version(4)
    asked, made, send = list[tuple[int, int]](), list[int](), Holder.send

    def noted(holder: Holder, connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
        asked.append((first, count))
        send(holder, connection, image, first, count)

    def slow(size: int) -> Image:
        made.append(size)
        time.sleep(0.1)  # until all have something to write
        return Image.allocate(size)

    monkeypatch.setattr(Holder, "send", noted)
    with holding(damaged(image, CHUNK), manifest) as (first, _), holding(image, manifest) as (second, _):
        staging = Staging(manifest, None, never, slow)
        with pytest.raises(SourceError, match="chunk 1 of 7"):
            Peer(5, 3).fetch(first.sources(manifest.label)[-1], manifest.label, staging)
        rows = [(0, 3 * CHUNK), (3 * CHUNK, 3 * CHUNK), (6 * CHUNK, manifest.size - 6 * CHUNK)]
        assert sorted(asked) == rows
        assert staging.missing() == [1, 2]
        Peer(5, 3).fetch(second.sources(manifest.label)[-1], manifest.label, staging)
        assert bytes(staging.finish().readable()) == bytes(image.readable())
    assert sorted(asked) == sorted([*rows, (CHUNK, CHUNK), (2 * CHUNK, CHUNK)])
    assert made == [manifest.size], "one image for all of them"


def test_who_pulls_does_not_wait_for_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = version(4)
    send = Holder.send

    def late(*arguments: Any) -> None:
        time.sleep(0.2)  # until it is waited for
        send(*arguments)

    monkeypatch.setattr(Holder, "send", late)
    with holding(image, manifest) as (holder, _):
        staging = Staging(manifest, None, never)
        arguments = (holder.sources(manifest.label)[-1], manifest.label, staging)
        thread = threading.Thread(target=Peer(60).fetch, args=arguments)
        thread.start()
        thread.join(30)
        assert not staging.missing()


def test_the_end_of_an_answer_does_not_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = version(4)
    waits, send = list[int](), Holder.send

    def noted(holder: Holder, connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
        waits.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        send(holder, connection, image, first, count)

    monkeypatch.setattr(Holder, "send", noted)
    with holding(image, manifest) as (holder, _):
        Peer(5).fetch(holder.sources(manifest.label)[-1], manifest.label, Staging(manifest, None, never))
    assert waits
    assert all(waits)


def test_the_next_answer_is_on_its_way_while_one_is_used() -> None:
    image, manifest = version(4)
    wanted = threading.Event()
    with holding(image, manifest, [b"one", b"two"]) as (holder, _):
        answer = holder.answer

        def noted(path: str) -> tuple[bytes | None, int, int] | None:
            if path.endswith("/1"):
                wanted.set()
            return answer(path)

        holder.answer = noted  # type: ignore[method-assign]
        source = holder.sources(manifest.label)[1]
        with connected(source, 5) as connection:
            paths = [f"/{manifest.label}/delta/{number}" for number in range(2)]
            found = answers(connection, source, paths)
            assert next(found) == b"one"
            assert wanted.wait(10), "the second is asked for before anybody wants it"
            assert list(found) == [b"two"]


def test_a_source_is_left_where_nobody_wants_its_version_any_more() -> None:
    image, manifest = version(4)
    looked = []

    def enough() -> None:
        looked.append(1)
        if len(looked) > 5:
            raise Superseded("too old")

    with holding(image, manifest) as (holder, _), pytest.raises(Superseded):
        Peer(5).fetch(holder.sources(manifest.label)[-1], manifest.label, Staging(manifest, None, enough))


def test_a_holder_serves_only_who_has_its_token_and_only_what_it_holds() -> None:
    image, manifest = version(4)
    with holding(image, manifest) as (holder, _):
        with pytest.raises(SourceError, match="status 401"):
            Peer(5).manifest(Source("peer", "", holder.url, "guess"), manifest.label)
        with pytest.raises(SourceError, match="does not hold"):
            Peer(5).manifest(Source("peer", "", holder.url, holder.token), "9:aa")
        url, token = holder.url, holder.token
    with pytest.raises(SourceError, match="its holder is gone or slow"):
        Peer(5).manifest(Source("peer", "", url, token), manifest.label)


def test_a_holder_keeps_the_last_two_also_when_versions_go_back() -> None:
    image, manifest = version(7)
    with holding(image, manifest) as (holder, _):
        for number in (6, 5):
            holder.keep(*reversed(version(number)))
        assert [label.partition(":")[0] for label in holder.labels()] == ["6", "5"]
        assert holder.held_bytes() == 2 * manifest.size
        assert image.descriptor == -1, "what is forgotten is given back"


def test_shared_memory_is_for_processes_of_one_host_only() -> None:
    assert Shm().reaches(Source("shm", this_host(), "a b"), None)
    assert not Shm().reaches(Source("shm", "another boot/pid:[1]", "a b"), None)


def test_a_folder_is_a_safetensors_checkpoint_and_keeps_the_newest(tmp_path: Path) -> None:
    for number in (3, 4, 6, 5):
        image, manifest = version(number)
        source = save(tmp_path, manifest, image, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000005-1", "00000006-1"]
    found = load_file(Path(source.address) / "model.safetensors")
    for name, tensor in tensors(5).items():
        assert torch.equal(found[name], tensor), name


def test_a_folder_whose_disk_fails_on_the_way_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write once: here it is told before the end."""
    image, manifest = version(4)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, manifest, image, 2)
    assert [path.name for path in tmp_path.iterdir()] == [".00000004-1.part"]


def test_a_folder_that_ends_too_early_is_damaged(tmp_path: Path) -> None:
    image, manifest = version(4)
    source = save(tmp_path, manifest, image, 2)
    path = Path(source.address) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    staging = Staging(manifest, None, never)
    with pytest.raises(SourceError, match="ends"):
        Disk().fetch(source, manifest.label, staging)
    assert staging.missing() == [len(manifest.chunks) - 1]


def test_a_delta_is_small_where_little_changed_and_not_made_where_much_did() -> None:
    old = torch.randn(4096).bfloat16()
    new = old.clone()
    new[::100] += 1
    one, other = (memoryview(tensor.view(torch.uint8).numpy()) for tensor in (old, new))
    delta, room = encode(one, other, 2), memoryview(bytearray(8192))
    assert len(delta) < 600
    room[:] = one
    decode(delta, room)
    assert room == other
    few, _ = version(4)
    many, manifest = version(5)
    assert deltas(manifest, few, many) is None


@given(st.binary(max_size=70), st.binary(max_size=70), st.sampled_from([1, 2, 4, 8]))
def test_a_delta_brings_any_change(one: bytes, other: bytes, word: int) -> None:
    size = min(len(one), len(other))
    old, new = memoryview(one)[:size], memoryview(other)[:size]
    room = memoryview(bytearray(old))
    decode(encode(old, new, word), room)
    assert room == new


def test_a_delta_that_goes_beyond_its_chunk_is_refused() -> None:
    old, new = memoryview(bytes(64)), memoryview(bytes(60) + b"1234")
    delta = encode(old, new, 4)
    decode(delta, memoryview(bytearray(64)))
    for size in (60, 63, 65):
        with pytest.raises(SourceError, match="another size"):
            decode(delta, memoryview(bytearray(size)))


@pytest.mark.parametrize("place", range(0, 90, 3))
def test_a_damaged_delta_is_refused_or_caught_by_the_chunks_digest(place: int) -> None:
    (parent, _), (image, manifest) = version(3), version(4)
    old, new = pairs(parent, image, manifest)[0]
    delta = bytearray(encode(old, new, 4))
    delta[place] ^= 16
    staging = Staging(manifest, parent, never)

    room = memoryview(bytearray(old))

    def bring() -> None:
        decode(bytes(delta), room)
        staging.keep(0, [room])

    with pytest.raises(SourceError):
        bring()


def test_a_delta_stands_aside_without_its_parent() -> None:
    _, manifest = version(4)
    assert not Delta(5).reaches(Source("delta", "", "http://x"), Staging(manifest, None, never))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("auto", ["shm", "delta", "peer", "disk"]), ("peer", ["peer"]), ("delta", ["delta", "peer"])],
)
def test_the_configuration_chooses(chosen: str, expected: list[str]) -> None:
    config = WeightSyncConfig(transport=chosen, delta=chosen != "peer")  # type: ignore[arg-type]
    assert [transport.kind for transport in transports(config)] == expected


@pytest.mark.parametrize(
    ("chosen", "needed"), [("disk", "folder"), ("delta", "delta"), ("cuda_ipc", "gpu"), ("nccl", "gpu")]
)
def test_a_transport_without_what_it_needs_is_refused(chosen: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"set weightsync.{needed} "):
        WeightSyncConfig(transport=chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", ["shm", "peer", "gloo", "stock"])
@pytest.mark.parametrize("option", [{"gpu": True}, {"delta": True}, {"folder": "/shared"}])
def test_an_option_that_the_transport_does_not_use_is_refused(chosen: str, option: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: set beside .* leave it out"):
        WeightSyncConfig(transport=chosen, **option)  # type: ignore[arg-type]
    WeightSyncConfig(**option)


@pytest.mark.parametrize("cut", [0, 1, CHUNK - 1])
def test_a_chunk_comes_in_parts_of_any_size_and_never_beyond_its_end(cut: int) -> None:
    image, manifest = version(4)
    data, staging = memoryview(image.readable()), Staging(manifest, None, never)
    for number in (1, 0, *range(2, 7)):
        chunk = manifest.chunks[number]
        bytes_ = data[chunk.offset : chunk.offset + chunk.size]
        if number == 0:
            with pytest.raises(SourceError, match="chunk 0 of 7"):
                staging.keep(0, [bytes_, memoryview(b"more")])
            assert staging.missing() == [0, *range(2, 7)]
        staging.keep(number, [bytes_[:cut], bytes_[cut:]])
    assert bytes(staging.finish().readable()) == bytes(image.readable())


def test_a_host_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = version(4)

    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    staging = Staging(manifest, None, never)
    with holding(image, manifest) as (holder, _):
        monkeypatch.setattr(Image, "write", full)
        with pytest.raises(SourceError, match="no memory for chunk 0"):
            Peer(5, 1).fetch(holder.sources(manifest.label)[-1], manifest.label, staging)
