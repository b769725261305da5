"""What the learner may and may not bring with it."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _modules_after(statement: str) -> set[str]:
    code = f"import warnings; warnings.simplefilter('ignore'); {statement}; import sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return {name.partition(".")[0] for name in output.split()}


def test_the_learner_imports_no_engine() -> None:
    loaded = _modules_after("import learner.sft, learner.step")
    assert "megatron" in loaded
    assert not loaded & {"sglang", "actors", "launch"}


@pytest.mark.parametrize("module", ["learner", "learner.config", "learner.errors"])
def test_configuration_imports_nothing_heavy(module: str) -> None:
    assert not _modules_after(f"import {module}") & {"torch", "megatron", "transformers", "numpy"}
