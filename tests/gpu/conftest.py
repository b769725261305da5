"""Tests of the GPU kernels: skipped where there is no GPU, untuned and with exact products where there is."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu_learner import untuned

# Before anything uses the GPU: for Transformer Engine cuBLAS would round fp32 operands to TF32.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them without a GPU."""
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: see docs/gpu.md"))


@pytest.fixture(autouse=True, scope="session")
def _untuned() -> None:
    """flash-linear-attention and mamba-ssm would measure some hundred kernels, which takes minutes."""
    if torch.cuda.is_available():
        untuned()
