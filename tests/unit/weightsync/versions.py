"""Small versions: tensors of several types, their images, and a damaged copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch

from weightsync.holder import Held, Holder
from weightsync.image import Image, write_image
from weightsync.manifest import Manifest, digest_of, encode_manifest
from weightsync.protocol import Offer, Source

CHUNK = 96
"""Bytes of a chunk in these tests; the 602 of a version make seven."""


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Of three types, out of the order in which an image has them, one of them empty."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "gate": torch.randn(7, 5, generator=draw).bfloat16(),
        "up": torch.randn(11, 9, generator=draw),
        "none": torch.zeros(0, 3),
        "count": torch.randint(0, 99, (13,), generator=draw),
        "norm": torch.randn(8, generator=draw),
    }


def version(
    number: int, *, seed: int | None = None, epoch: int = 1, parent: str = ""
) -> tuple[Image, Manifest]:
    """The image and manifest of a version; its tensors come from its number unless `seed` is given."""
    weights = tensors(number if seed is None else seed)
    named = msgspec.structs.replace(Manifest.of(number, weights), epoch=epoch, parent=parent)
    return write_image(named, weights, CHUNK)


def offer_of(manifest: Manifest, sources: list[Source]) -> Offer:
    """The offer of a version from these sources."""
    sealed = digest_of(encode_manifest(manifest))
    return Offer("1:a", manifest.version, manifest.digest, 0, manifest.epoch, sealed, sources)


def damaged(image: Image, offset: int) -> Image:
    """A sealed copy with one bit changed."""
    data = bytearray(image.readable())
    data[offset] ^= 4
    copy = Image.allocate(image.size)
    copy.write(0, memoryview(data))
    copy.seal()
    return copy


@contextmanager
def holding(
    image: Image, manifest: Manifest, delta: list[bytes] | None = None
) -> Iterator[tuple[Holder, Held]]:
    """A holder of one version."""
    holder = Holder("127.0.0.1")
    try:
        yield holder, holder.keep(manifest, image, delta)
    finally:
        holder.close()
