"""The examples in docstrings say what is so."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("actors", "buffer", "examples", "launch", "learner", "weightsync")
EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text()
)
EXTRAS = {"actors.rewards.reasoning": "reasoning_gym"}
"""Modules that need a package of an extra."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_examples_hold(name: str) -> None:
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason="needs an extra")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed, "see the output above"
