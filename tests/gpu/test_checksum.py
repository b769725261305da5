"""The sums that a GPU computes in one kernel are those of the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from weightsync.checksum import sums
from weightsync.image import chunk_ranges
from weightsync.manifest import CHUNK_BYTES, Chunk


def chunks_of(size: int, longest: int) -> list[Chunk]:
    return [Chunk(offset, count, "") for offset, count in chunk_ranges(size, longest)]


def noise(size: int) -> torch.Tensor:
    source = torch.Generator("cuda").manual_seed(size)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda", generator=source)


@pytest.mark.parametrize(
    ("size", "longest"),
    [
        (1, 4),
        (602, 96),
        (30_001, 100),
        (1 << 20, 8192),
        (999_999, 8196),
        (40 * CHUNK_BYTES, CHUNK_BYTES),
        (33 * CHUNK_BYTES + 70_003, CHUNK_BYTES),
        (16 << 20, 16 << 20),
    ],
)
def test_they_are_those_of_the_cpu(size: int, longest: int) -> None:
    image, chunks = noise(size), chunks_of(size, longest)
    assert sums(image, chunks) == sums(image.cpu(), chunks)


def test_a_changed_word_changes_the_sum_of_its_chunk_alone() -> None:
    size = 20 * CHUNK_BYTES + 602
    image, chunks = noise(size), chunks_of(size, CHUNK_BYTES)
    before = sums(image, chunks)
    for at in [0, 3, CHUNK_BYTES - 1, CHUNK_BYTES, 17 * CHUNK_BYTES + 8191, size - 1]:
        image[at] ^= 128
        pairs = enumerate(zip(before, sums(image, chunks), strict=True))
        changed = [number for number, (was, now) in pairs if was != now]
        assert changed == [at // CHUNK_BYTES]
        image[at] ^= 128
    assert sums(image, chunks) == before


def test_it_waits_for_the_stream_that_is_current() -> None:
    image, chunks = noise(64 * CHUNK_BYTES), chunks_of(64 * CHUNK_BYTES, CHUNK_BYTES)
    expected, copy = sums(image, chunks), torch.zeros_like(image)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        copy.copy_(image)
        assert sums(copy, chunks) == expected
