"""What an import brings with it, and what is never imported. The layers themselves: import-linter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("launch", "learner", "actors", "weightsync", "buffer")

HEAVY = {"torch", "transformers", "sglang", "megatron", "ray", "wandb", "matplotlib"}
DATA_FREE = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
"""Formats that run code when they are read: records and weights never use them."""

INDEX = ROOT / "learner/convert/dist_index.py"
"""The one exception: torch's index of a distributed checkpoint is a pickle. What is read there can
build that index's own classes and nothing else; tests/unit/learner/test_convert.py tries."""


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether it is imported when the module is) of every import that runs."""
    tree = ast.parse(path.read_text())
    idle = {id(node) for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in idle:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], id(node) not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0], id(node) not in inner


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_launch_imports_nothing_heavy_at_the_top() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in _sources("launch")
        for name, at_import in _imports(path)
        if at_import and name in HEAVY
    }
    assert not wrong


def test_nothing_that_is_read_can_run_code() -> None:
    for package in PACKAGES:
        for path in _sources(package):
            unsafe = {name for name, _ in _imports(path)} & set(DATA_FREE)
            assert unsafe == ({"pickle"} if path == INDEX else set()), path
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                    assert given.get("weights_only") == "True", path


@pytest.mark.parametrize(
    "modules",
    [
        PACKAGES,
        ("buffer.config", "weightsync.config", "learner.config", "launch.config"),
        ("buffer.stream", "buffer.admission", "buffer.ledger", "buffer.local_server", "weightsync.manifest"),
        ("launch.cli",),
    ],
    ids=["packages", "configuration", "stream", "command line"],
)
def test_a_light_import_stays_light(modules: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert not {name.partition(".")[0] for name in loaded.stdout.split()} & HEAVY
