"""What `launch eval` is given: a Hugging Face folder, a kept version, or a checkpoint.

with subject(Path("runs/demo/checkpoints/step-00000140-1"), like="runs/demo/model", show=print) as one:
    one.model       # a Hugging Face folder, which is gone after the block
    one.version     # 140
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from launch.errors import LaunchError

_PARENTS = 3
"""So many folders up a run's `config.json` is looked for."""


class Subject(msgspec.Struct, frozen=True):
    """Weights to evaluate, and which they are."""

    model: Path
    """A Hugging Face folder."""
    version: int | None
    """Of the run; null if the folder does not say so."""
    digest: str
    """Of the version, empty if the folder does not say so."""
    lineage: int | None
    """Of the run; null if the folder does not say so."""


def run_config_of(folder: Path) -> dict[str, Any]:
    """The configuration of the run whose folder holds `folder`; without one, one that names nothing."""
    for parent in list(folder.resolve().parents)[:_PARENTS]:
        if (parent / "config.json").is_file():
            tree: dict[str, Any] = msgspec.json.decode((parent / "config.json").read_bytes())
            if {"rollout", "stream", "data"} <= tree.keys():
                return tree
    return {"model": {"path": ""}, "data": {"path": ""}}


@contextmanager
def subject(folder: Path, *, like: str, show: Callable[[str], None]) -> Iterator[Subject]:
    """The weights in `folder`, as a Hugging Face folder for the time of the block.

    `like`: the model's Hugging Face folder, whose config, tokenizer and dtypes a checkpoint is converted
    with. `show` gets a progress line. Raises `LaunchError`, `LearnerError`.
    """
    if (folder / ".metadata").is_file():
        with tempfile.TemporaryDirectory(prefix="slipstream-eval-") as scratch:
            yield _converted(folder, like, Path(scratch) / "model", show)
    elif (folder / "config.json").is_file():
        from learner.kept import read_kept

        kept = read_kept(folder)
        yield Subject(folder, kept.version, kept.digest, kept.lineage) if kept else _nameless(folder)
    else:
        raise LaunchError(
            f"{folder} has no config.json and no .metadata, expected a Hugging Face folder, such as "
            "runs/NAME/export, or a checkpoint, such as runs/NAME/checkpoints/step-..."
        )


def _converted(folder: Path, like: str, out: Path, show: Callable[[str], None]) -> Subject:
    """A checkpoint of a learner of ours, or another of Megatron-Core's, converted to `out`."""
    from learner.checkpoint.folder import check_files, read_state
    from learner.convert.folders import mcore_to_hf

    if not like:
        raise LaunchError(f"{folder} is a checkpoint: say of which model by model.path=FOLDER")
    state = read_state(folder) if (folder / "state.json").is_file() else None
    check_files(folder)
    mcore_to_hf(
        folder, Path(like), out, lambda done, total: show(f"converting {folder}: {done}/{total} files")
    )
    return Subject(out, state.version, state.weights, state.lineage) if state else _nameless(out)


def _nameless(model: Path) -> Subject:
    return Subject(model, None, "", None)
