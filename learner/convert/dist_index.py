"""The index of a distributed checkpoint: of each key its shape and where its pieces lie.

Torch writes it as a pickle, which is why this is the one file that reads pickles. It builds nothing
but the classes of such an index: a file that asks for anything else is refused before it can run.
"""

from __future__ import annotations

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from learner.errors import ModelError

FILE = ".metadata"
"""Its name in the folder."""

ALLOWED = {
    metadata.__name__: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    planner.__name__: {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    filesystem.__name__: {"_StorageInfo"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}
"""By module, every class or function that an index may need, beside dtypes; none does more than build
a value."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What the file asks for, if it belongs to an index."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("pathlib"):  # a private module from Python 3.13 on
            module = pathlib.__name__
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in `folder`. Raises `ModelError` if there is none, or another thing."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; give the folder of one distributed checkpoint") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{path}: not the index of a distributed checkpoint: {error}") from error
    if not isinstance(index, Metadata):
        raise ModelError(
            f"{path}: got a {type(index).__name__}, expected the index of a distributed checkpoint"
        )
    return index


def write_index(folder: Path, index: Metadata) -> None:
    """Write the index as torch does."""
    (folder / FILE).write_bytes(pickle.dumps(index))
