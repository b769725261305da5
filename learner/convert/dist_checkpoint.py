"""Megatron-Core's distributed checkpoints (`torch_dist`), written and read tensor by tensor.

A folder of `.distcp` files, each a row of saved tensors, and an index that says of each key its
shape and where its pieces lie. Nothing here knows of ranks: a learner of any parallelism reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from learner.convert.dist_index import read_index, write_index
from learner.errors import ModelError

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""What Megatron-Core writes of such a folder; importing it for this would take seconds."""


class Piece(msgspec.Struct, frozen=True):
    """Where one piece of a key lies."""

    key: str
    """Key of the whole tensor."""
    shape: tuple[int, ...]
    """Dimensions of the whole tensor."""
    start: tuple[int, ...]
    """Where the piece begins in it."""
    size: tuple[int, ...]
    """Dimensions of the piece."""
    dtype: str
    """As torch names it, without "torch."."""
    file: str
    """File in the folder."""
    offset: int
    """First byte."""
    length: int
    """Bytes."""


def write_pieces(
    path: Path, tensors: Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]
) -> list[Piece]:
    """Write (key, shape of the whole, start, piece) one after another to `path`; where they are."""
    pieces = []
    with path.open("wb") as file:
        for key, shape, start, tensor in tensors:
            offset = file.tell()
            torch.save(tensor.clone(), file)  # a view would be saved with all that it is a view of
            dtype = str(tensor.dtype).removeprefix("torch.")
            length = file.tell() - offset
            pieces.append(Piece(key, shape, start, tuple(tensor.shape), dtype, path.name, offset, length))
    return pieces


def write_checkpoint_index(folder: Path, pieces: list[Piece]) -> None:
    """Make `folder` with its files a checkpoint that Megatron-Core loads."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places = {}
    for piece in pieces:
        properties = TensorProperties(dtype=getattr(torch, piece.dtype))
        whole = tensors.setdefault(
            piece.key, TensorStorageMetadata(properties, torch.Size(piece.shape), chunks=[])
        )
        place = MetadataIndex(piece.key, piece.start, len(whole.chunks))
        places[place] = _StorageInfo(piece.file, piece.offset, piece.length)
        whole.chunks.append(ChunkStorageMetadata(torch.Size(piece.start), torch.Size(piece.size)))
    # What is not a tensor: nothing, in the list that Megatron-Core expects there.
    common, nothing = "common_state/shard_0_1", "common_0.distcp"
    torch.save([{}], folder / nothing)
    tensors[common] = BytesStorageMetadata()
    places[MetadataIndex(common)] = _StorageInfo(nothing, 0, (folder / nothing).stat().st_size)
    write_index(folder, Metadata(tensors, storage_data=places))
    (folder / "metadata.json").write_bytes(msgspec.json.encode(BACKEND))


class DistCheckpoint:
    """A checkpoint open for reading."""

    def __init__(self, folder: Path) -> None:
        """Read the index of `folder`. Raises `ModelError` if there is none."""
        self.folder = folder
        index = read_index(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        self._tensors = {
            key: value
            for key, value in index.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.shapes = {key: tuple(value.size) for key, value in self._tensors.items()}
        """Key and shape of every tensor, before any is read."""

    def read(self, key: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """A part of the tensor `key`, from as many pieces as it was saved in, in its stored dtype."""
        stored = self._tensors[key]
        part = torch.empty(size, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        found = sum(torch.Size(item.lengths).numel() for item in items)
        if found != part.numel():
            raise ModelError(
                f"{self.folder}: {key}: got {found} of {part.numel()} elements from {start} on; the "
                "checkpoint lacks the shards of some rank, copy all of its files"
            )
        self._reader.read_data(LoadPlan(items), _Into(part)).wait()
        return part


class _Into:
    """What torch's reader asks for a place to put what it read."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        """The part of the target that `item` fills."""
        part = self._target
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: it was filled in place."""
