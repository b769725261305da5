"""Writing a safetensors file tensor by tensor, so that none but the one at hand is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from learner.convert.hf import DTYPES

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of every tensor of a file, in its order."""


def write_safetensors(path: Path, layout: Layout, tensors: Iterator[torch.Tensor]) -> None:
    """Write `tensors`, which come in the order of `layout`, to `path`, casting to its dtypes.

    The format: a length, a JSON header, the bytes of the tensors (https://huggingface.co/docs/safetensors).
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, _), tensor in zip(layout.values(), tensors, strict=True):
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy())
