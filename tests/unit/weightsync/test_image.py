"""An image holds exactly the tensors, nobody can change it, and it outlives its names."""

from __future__ import annotations

import errno
import mmap
import os

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.weightsync.versions import CHUNK, tensors, version
from weightsync.errors import ManifestError, SourceError
from weightsync.image import Image, Reserve, chunk_ranges, write_image
from weightsync.manifest import CHUNK_BYTES, Chunk, Manifest, decode_manifest, digest_of, encode_manifest


def test_every_tensor_lies_where_the_manifest_says() -> None:
    image, manifest = version(3)
    data = bytearray(image.readable())
    for entry in manifest.tensors:
        expected = tensors(3)[entry.name]
        found = torch.frombuffer(data, dtype=torch.uint8)[entry.offset : entry.offset + expected.nbytes]
        assert entry.offset % expected.element_size() == 0, entry
        assert torch.equal(found.view(expected.dtype).view(expected.shape), expected), entry
    assert manifest.size == sum(tensor.nbytes for tensor in tensors(3).values()), "no gaps"


def test_chunks_cover_the_image_and_carry_its_digests() -> None:
    image, manifest = version(3)
    data = bytes(image.readable())
    assert [(chunk.offset, chunk.size) for chunk in manifest.chunks] == chunk_ranges(len(data), CHUNK)
    for chunk in manifest.chunks:
        assert chunk.digest == digest_of(data[chunk.offset : chunk.offset + chunk.size])


def test_what_is_read_is_there_and_the_end_is_said() -> None:
    image, _ = version(3)
    room = memoryview(bytearray(100))
    image.read(image.size - 100, room)
    assert room == bytes(image.readable())[-100:]
    with pytest.raises(SourceError, match="expected 1 more"):
        image.read(image.size - 99, room)


def test_the_digest_of_a_version_is_that_of_its_tensors_however_they_lie() -> None:
    _, manifest = version(3)
    assert manifest.digest == Manifest.of(9, tensors(3)).digest
    assert manifest.layout == version(4)[1].layout, "one layout for all versions of a run"


def test_a_sealed_image_cannot_be_written_by_anybody() -> None:
    image, _ = version(3)
    with pytest.raises(PermissionError):
        os.pwrite(image.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(image.descriptor, image.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(image.descriptor, 1)


def test_an_image_that_could_still_change_is_not_opened() -> None:
    image = Image.allocate(64)
    with pytest.raises(SourceError, match="sealed: False"):
        Image.open(image.path, 64)
    image.seal()
    with pytest.raises(SourceError, match="got 64 bytes"):
        Image.open(image.path, 65)
    assert Image.open(image.path, 64).sealed


SIZE = 3 * CHUNK_BYTES + 5


def taken(image: Image) -> int:
    """Bytes of memory that it has."""
    return 512 * os.fstat(image.descriptor).st_blocks


def test_a_reserve_has_the_memory_of_the_next_image() -> None:
    reserve = Reserve()
    first = reserve.allocate(SIZE)
    assert (taken(first), reserve.size) == (0, 0)
    reserve.refill()
    assert reserve.size == SIZE
    next_ = reserve.allocate(SIZE)
    assert taken(next_) >= SIZE
    assert reserve.size == 0
    data = memoryview(os.urandom(SIZE))
    next_.write(0, data)
    next_.seal()
    assert bytes(next_.readable()) == data


def test_a_reserve_of_another_size_is_given_back() -> None:
    reserve = Reserve()
    reserve.allocate(SIZE).close()
    reserve.refill()
    before = len(os.listdir("/proc/self/fd"))
    other = reserve.allocate(64)
    assert (other.size, taken(other)) == (64, 0)
    assert len(os.listdir("/proc/self/fd")) == before, "one came, one went"


def test_a_reserve_takes_nothing_for_nobody() -> None:
    reserve = Reserve()
    reserve.refill()
    reserve.allocate(SIZE).close()
    reserve.refill()
    reserve.allocate(SIZE)
    reserve.refill()
    reserve.refill()
    assert reserve.size == SIZE
    reserve.close()
    reserve.allocate(SIZE).close()
    reserve.refill()
    assert reserve.size == 0, "closed for ever"


@pytest.mark.parametrize("what", ["closed", "no memory"])
def test_what_ends_in_refilling_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    reserve = Reserve()
    reserve.allocate(SIZE).close()
    pieces: list[int] = []

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        pieces.append(size)
        if len(pieces) == 2:
            if what == "no memory":
                raise OSError(errno.ENOSPC, "no space")
            reserve.close()

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    before = len(os.listdir("/proc/self/fd"))
    reserve.refill()
    assert (reserve.size, pieces) == (0, [CHUNK_BYTES] * 2)
    assert len(os.listdir("/proc/self/fd")) == before
    reserve.allocate(SIZE).close()


def test_an_opened_image_outlives_its_holder() -> None:
    image, manifest = version(3)
    path, data = image.path, bytes(image.readable())
    other = Image.open(path, manifest.size)
    image.close()
    assert bytes(other.readable()) == data
    other.close()
    with pytest.raises(SourceError, match="its process is gone"):
        Image.open(f"/proc/{os.getpid()}/fd/999999", manifest.size)


@given(st.integers(1, 1000), st.integers(1, 200))
def test_chunk_ranges_are_a_partition(size: int, chunk_bytes: int) -> None:
    places = [
        place
        for offset, length in chunk_ranges(size, chunk_bytes)
        for place in range(offset, offset + length)
    ]
    assert places == list(range(size))


def test_a_manifest_travels_and_another_one_is_refused() -> None:
    _, manifest = version(3)
    encoded = encode_manifest(manifest)
    assert decode_manifest(encoded, digest_of(encoded)) == manifest
    with pytest.raises(ManifestError, match="ask another source"):
        decode_manifest(encoded[:-1] + b"x", digest_of(encoded))


@pytest.mark.parametrize("spoil", ["gap", "overlap", "short", "layout"])
def test_a_manifest_that_contradicts_itself_is_refused(spoil: str) -> None:
    _, manifest = version(3)
    chunks = list(manifest.chunks)
    replace = msgspec.structs.replace
    if spoil == "gap":
        chunks[1] = replace(chunks[1], offset=chunks[1].offset + 1)
    elif spoil == "overlap":
        chunks.insert(1, Chunk(0, 1, chunks[0].digest))
    elif spoil == "short":
        chunks.pop()
    else:
        manifest = replace(manifest, layout="00")
    encoded = encode_manifest(replace(manifest, chunks=chunks))
    with pytest.raises(ManifestError, match="version 3"):
        decode_manifest(encoded, digest_of(encoded))


def test_a_version_without_bytes_has_an_empty_image() -> None:
    nothing = {"none": torch.zeros(0)}
    image, manifest = write_image(Manifest.of(0, nothing), nothing)
    assert (image.size, manifest.chunks) == (0, [])
