"""What a version is: its number, the digest of its exported weights, and the bytes that carry it.

A version has two kinds of digest. `Manifest.digest` stands for the exported tensors themselves, whoever
looks at them: it names the version in Redis, in every group and in a replay. A chunk's digest stands for
a range of the image, which is what travels. Tensors lie in the image wider types first and without gaps,
so that each can be viewed where it lies and the image is the body of a safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
import xxhash

from weightsync.errors import ManifestError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 4 << 20
"""Bytes of a chunk, the last one apart: what stays in a processor's cache from one step to the next."""


class TensorEntry(msgspec.Struct, frozen=True):
    """One exported tensor."""

    name: str
    """Name in the Hugging Face checkpoint."""
    dtype: str
    """Such as `float32`."""
    shape: tuple[int, ...]
    """Its dimensions; () for a scalar."""
    offset: int = 0
    """Of its first byte in the image."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A range of the image, verified by itself."""

    offset: int
    """Bytes from the start of the image."""
    size: int
    """Bytes."""
    digest: str
    """xxh3-128 of these bytes; hex."""
    sum: int | None = None
    """What `weightsync.checksum` computes of them; absent where the learner keeps no version on a GPU."""


class Manifest(msgspec.Struct, frozen=True):
    """A version of the weights."""

    version: int
    """Optimizer steps behind these weights."""
    digest: str
    """xxh3-128 over names, dtypes, shapes and bytes of the tensors, in order; hex."""
    tensors: list[TensorEntry]
    """In the order in which they were exported."""
    lineage: int = 0
    """Of the run, when the version was committed."""
    epoch: int = 0
    """Number of the learner's epoch; agents refuse one that is lower than the newest they know."""
    parent: str = ""
    """Digest of the version that a delta to this one starts from; empty: this one comes whole only."""
    layout: str = ""
    """Fingerprint of names, dtypes, shapes and offsets; equal for all versions of a run."""
    size: int = 0
    """Bytes of the image."""
    chunks: list[Chunk] = []
    """The whole image, in order; empty for a manifest that only names a version."""

    @property
    def label(self) -> str:
        """What an engine serving this version is told to call it.

        >>> Manifest(12, "9c", []).label
        '12:9c'
        """
        return f"{self.version}:{self.digest}"

    @property
    def longest(self) -> int:
        """Bytes of the largest chunk."""
        return max(chunk.size for chunk in self.chunks)

    @classmethod
    def of(cls, version: int, tensors: Mapping[str, torch.Tensor]) -> Manifest:
        """The manifest of exported tensors (contiguous, on the CPU), in their order, without chunks."""
        import torch

        entries, state = [], xxhash.xxh3_128()
        for name, tensor in tensors.items():
            entry = TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            state.update(_header(entry))
            # As bytes: NumPy has no bfloat16.
            state.update(tensor.reshape(-1).view(torch.uint8).numpy())
            entries.append(entry)
        return cls(version, state.hexdigest(), entries)

    def placed(self, sizes: Mapping[str, tuple[int, int]]) -> Manifest:
        """This manifest with every tensor's offset, the image's size and the layout's fingerprint.

        `sizes` are (bytes of an item, bytes of the tensor) by name.
        """
        offset, offsets = 0, {}
        for entry in sorted(self.tensors, key=lambda entry: -sizes[entry.name][0]):
            offsets[entry.name] = offset
            offset += sizes[entry.name][1]
        tensors = [msgspec.structs.replace(entry, offset=offsets[entry.name]) for entry in self.tensors]
        return msgspec.structs.replace(self, tensors=tensors, size=offset, layout=fingerprint(tensors))


def fingerprint(tensors: Iterable[TensorEntry]) -> str:
    """xxh3-128 over names, dtypes, shapes and offsets; hex."""
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(list(tensors)))


def digest_of(data: bytes | memoryview) -> str:
    """xxh3-128 of bytes; hex."""
    return xxhash.xxh3_128_hexdigest(data)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as it travels: msgpack."""
    return msgspec.msgpack.encode(manifest)


def decode_manifest(data: bytes, digest: str) -> Manifest:
    """The manifest of these bytes, whose own digest the offer names.

    Raises `ManifestError` for other bytes, or for chunks that are not exactly the image.
    """
    if digest_of(data) != digest:
        raise ManifestError(f"manifest: got digest {digest_of(data)}, offered {digest}; ask another source")
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise ManifestError(f"manifest: {error}; learner and actor are of different releases") from error
    end = 0
    for number, chunk in enumerate(manifest.chunks):
        if chunk.offset != end or chunk.size <= 0:
            raise ManifestError(
                f"version {manifest.version}: chunk {number} is [{chunk.offset}, +{chunk.size}), expected "
                f"one that starts at {end}; learner and actor are of different releases"
            )
        end += chunk.size
    if end != manifest.size or manifest.layout != fingerprint(manifest.tensors):
        raise ManifestError(
            f"version {manifest.version}: chunks end at {end} and the layout is "
            f"{fingerprint(manifest.tensors)}, declared {manifest.size} and {manifest.layout}"
        )
    return manifest


def parse_label(label: str) -> tuple[int, str]:
    """(version, digest) of a label. Raises `ValueError` for anything else.

    >>> parse_label("12:9c")
    (12, '9c')
    """
    version, separator, digest = label.partition(":")
    if not separator or not version.isdigit():
        raise ValueError(f"weight version: got {label!r}, expected <version>:<digest>")
    return int(version), digest


def _header(entry: TensorEntry) -> bytes:
    """What stands for a tensor before its bytes; where it lies in an image does not matter."""
    return msgspec.json.encode({"name": entry.name, "dtype": entry.dtype, "shape": entry.shape})
