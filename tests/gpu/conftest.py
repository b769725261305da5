"""Tests of the GPU kernels: skipped where there is no GPU, untuned and with exact products where there is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Before anything uses the GPU: for Transformer Engine cuBLAS would round fp32 operands to TF32.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them without a GPU."""
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: see docs/gpu.md"))


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled by torch, and Triton takes the last of a kernel's configurations, unmeasured.

    flash-linear-attention and mamba-ssm would compile some hundred of them, which takes minutes.
    """
    if torch.cuda.is_available():
        from triton.runtime.autotuner import Autotuner

        monkeypatch.setattr(Autotuner, "prune_configs", lambda self, *_args, **_kwargs: self.configs[-1:])
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
