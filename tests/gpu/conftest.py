"""Tests of the GPU kernels: skipped where there is no GPU, with products in full fp32 where there is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Before anything uses the GPU: cuBLAS would round fp32 operands to TF32 for Transformer Engine, and Triton
# for flash-linear-attention and mamba-ssm, and no parity would show.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them without a GPU."""
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: see docs/gpu.md"))


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Nothing is compiled by torch: ragged tiny batches would spend minutes on it."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
