"""The sum of a chunk is its formula's, and any damage to a word changes it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from tests.unit.weightsync.versions import version
from weightsync.checksum import sums, verify
from weightsync.errors import SourceError
from weightsync.image import chunk_ranges
from weightsync.manifest import Chunk

ROOT = Path(__file__).parents[3]
MASK = (1 << 64) - 1


def key(index: int) -> int:
    """splitmix64, as its authors write it, of the state after `index` + 1 steps; made odd."""
    state = (index + 1) * 0x9E3779B97F4A7C15 & MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return (state ^ (state >> 31)) | 1


def expected(data: bytes) -> int:
    """The sum by the formula in plain numbers, signed."""
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
    total = sum(key(index) * word for index, word in enumerate(words)) & MASK
    return total - (1 << 64) if total >> 63 else total


def chunks_of(size: int, longest: int) -> list[Chunk]:
    return [Chunk(offset, count, "") for offset, count in chunk_ranges(size, longest)]


@pytest.mark.parametrize("size", [4, 96, 97, 98, 99, 600, 602])
def test_it_is_the_formula(size: int) -> None:
    data = random.Random(size).randbytes(size)
    image = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = sums(image, chunks_of(size, 96))
    assert found == [expected(data[at : at + count]) for at, count in chunk_ranges(size, 96)]
    assert sums(image[:0], []) == []


def test_splitmix64_is_the_published_one() -> None:
    """The first value of the generator seeded with 0, which reference implementations print."""
    assert key(0) == 0xE220A8397B1DCDAF | 1


def test_every_bit_counts_also_two_of_the_highest() -> None:
    """Products of 64-bit words would lose a pair of sign bits; words of 32 bits do not."""
    image = torch.frombuffer(bytearray(random.Random(3).randbytes(64)), dtype=torch.uint8)
    chunks = chunks_of(64, 64)
    seen = set(sums(image, chunks))
    for bit in range(512):
        image[bit // 8] ^= 1 << bit % 8
        seen.update(sums(image, chunks))
        image[bit // 8] ^= 1 << bit % 8
    for first, second in [(3, 7), (7, 15), (3, 63)]:
        image[first] ^= 128
        image[second] ^= 128
        seen.update(sums(image, chunks))
        image[first] ^= 128
        image[second] ^= 128
    assert len(seen) == 1 + 512 + 3


def test_two_words_that_change_places_change_it() -> None:
    data = bytearray(random.Random(4).randbytes(64))
    image = torch.frombuffer(data, dtype=torch.uint8)
    before = sums(image, chunks_of(64, 64))
    data[:4], data[32:36] = data[32:36], data[:4]
    assert sums(image, chunks_of(64, 64)) != before


KERNEL = """
import torch
from weightsync.checksum import _row_sums
from weightsync.multilinear import row_sums
draw = torch.Generator().manual_seed(0)
for shape in [(1, 1), (3, 7), (17, 2048), (40, 2049), (2, 5000)]:
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=draw)
    assert torch.equal(row_sums(words), _row_sums(words)), shape
"""


def test_the_kernel_of_gpus_computes_the_same() -> None:
    """In Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNEL], cwd=ROOT, env=environment, check=True)


def test_the_damaged_chunk_is_named() -> None:
    image, manifest = version(4)
    memory = torch.frombuffer(image.private(), dtype=torch.uint8)
    with pytest.raises(SourceError, match=r"chunk 0 of 7: got sum .* expected None"):
        verify(manifest, memory)
    found = sums(memory, manifest.chunks)
    summed = replace(
        manifest, chunks=[replace(chunk, sum=one) for chunk, one in zip(manifest.chunks, found, strict=True)]
    )
    verify(summed, memory)
    memory[3 * 96 + 5] ^= 1
    with pytest.raises(SourceError, match="version 4: chunk 3 of 7"):
        verify(summed, memory)
