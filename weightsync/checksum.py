"""A checksum of a chunk that a GPU computes where the bytes lie.

xxh3 works on one byte after another, which no GPU is good at. This is multilinear hashing: a chunk is words
w_i of 32 bits, and its sum is

    sum over i of  k_i * w_i   mod 2^64        k_i = splitmix64(i + 1) | 1

A chunk with one word changed never has the sum of the right one, as an odd k_i times less than 2^32 is
not 0; other changes pass with a chance of about 2^-32, if keys are as good as random (D. Lemire, O. Kaser:
Strongly universal string hashing is fast, The Computer Journal 57, 2014; G. Steele et al.: Fast
splittable pseudorandom number generators, OOPSLA 2014).

The sum finds damage on the way. It does not replace a chunk's digest: the learner takes it from bytes that
it has read back from the GPU and found to have that digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from weightsync.errors import SourceError
from weightsync.manifest import Chunk, Manifest

_WORD = 4


def sums(image: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """The sums of the chunks of `image`, uint8 [bytes], on whatever device it lies; signed, 64 bits.

    Chunks are one behind the other and start at multiples of 4.
    """
    found = [torch.empty(0, dtype=torch.int64, device=image.device)]
    for _, alike in groupby(chunks, lambda chunk: chunk.size):
        run = list(alike)
        part = image[run[0].offset : run[-1].offset + run[-1].size]
        if rest := -part.numel() % _WORD:
            part = torch.nn.functional.pad(part, (0, rest))
        found.append(_row_sums(part.view(torch.int32).view(len(run), -1)))
    return torch.cat(found).tolist()


def verify(manifest: Manifest, image: torch.Tensor) -> None:
    """Raises `SourceError` naming the first chunk of `image` that does not have the manifest's sum."""
    found, wanted = sums(image, manifest.chunks), [chunk.sum for chunk in manifest.chunks]
    if found != wanted:
        number = [got == one for got, one in zip(found, wanted, strict=True)].index(False)
        raise SourceError(
            f"version {manifest.version}: chunk {number} of {len(found)}: got sum {found[number]}, "
            f"expected {wanted[number]}; the source is damaged"
        )


def _row_sums(words: torch.Tensor) -> torch.Tensor:
    """int64 [n] of int32 [n, m]."""
    if words.is_cuda:
        from weightsync.multilinear import row_sums  # needs Triton

        return row_sums(words)
    keys = _keys(words.shape[1], words.device)
    return torch.stack([(row * keys).sum() for row in words])


def _keys(count: int, device: torch.device) -> torch.Tensor:
    """splitmix64 of 1 to `count`, made odd, int64 [count]."""
    state = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return (state ^ _shifted(state, 31)) | 1


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that brings in zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return value - (1 << 64) if value >> 63 else value
