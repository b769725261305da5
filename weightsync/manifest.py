"""What a version is: its number, the digest of its exported weights, and the tensors it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
import xxhash

if TYPE_CHECKING:
    import torch


class TensorEntry(msgspec.Struct, frozen=True):
    """One exported tensor."""

    name: str
    """Name in the Hugging Face checkpoint."""
    dtype: str
    """Such as `float32`."""
    shape: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True):
    """A version of the weights."""

    version: int
    """Optimizer steps behind these weights."""
    digest: str
    """xxh3-128 over names, dtypes, shapes and bytes, in order; hex."""
    tensors: list[TensorEntry]

    @property
    def label(self) -> str:
        """What an engine serving this version is told to call it.

        >>> Manifest(12, "9c", []).label
        '12:9c'
        """
        return f"{self.version}:{self.digest}"

    @classmethod
    def of(cls, version: int, tensors: Mapping[str, torch.Tensor]) -> Manifest:
        """The manifest of exported tensors (contiguous, on the CPU), in their order."""
        import torch

        entries, state = [], xxhash.xxh3_128()
        for name, tensor in tensors.items():
            entry = TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            state.update(msgspec.json.encode(entry))
            # As bytes: NumPy has no bfloat16.
            state.update(tensor.reshape(-1).view(torch.uint8).numpy())
            entries.append(entry)
        return cls(version, state.hexdigest(), entries)


def parse_label(label: str) -> tuple[int, str]:
    """(version, digest) of a label. Raises `ValueError` for anything else.

    >>> parse_label("12:9c")
    (12, '9c')
    """
    version, separator, digest = label.partition(":")
    if not separator or not version.isdigit():
        raise ValueError(f"weight version: got {label!r}, expected <version>:<digest>")
    return int(version), digest
