"""Exported versions, kept as Hugging Face folders: `weights/<version>` of a run's folder.

    weights/
      12/
        model.safetensors, config.json, tokenizer.json ...   a Hugging Face folder like any other
        version.json                                         version, digest, lineage

What was exported for the engines is written by a thread while the learner trains on. A folder gets its
name last, so it is whole whenever it is seen. One version waits at most, and beside it one that an
evaluation is to have: on a slow disk the newest wins, and what was overtaken is never written.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import msgspec

from learner.checkpoint.folder import sync
from weightsync.manifest import Manifest

if TYPE_CHECKING:
    import torch

log = logging.getLogger("learner")

KEPT = "weights"
"""Name of the folder of kept versions in a run's folder."""
EVALUATIONS = "evaluations.jsonl"
"""Name of the file of evaluations in a run's folder, a line each."""
_LABEL = "version.json"


class Kept(msgspec.Struct, frozen=True):
    """`version.json` of a kept version."""

    version: int
    """Optimizer steps behind the weights."""
    digest: str
    """Of the exported tensors, as committed."""
    lineage: int
    """Of the run, when it was exported."""


def kept_versions(root: Path) -> dict[int, Kept]:
    """The kept versions in `weights/`, by number. Folders without `version.json` are none of ours."""
    paths = root.iterdir() if root.is_dir() else iter(())
    found = [read_kept(path) for path in paths if path.name.isdecimal()]
    return {one.version: one for one in sorted(filter(None, found), key=lambda one: one.version)}


def read_kept(path: Path) -> Kept | None:
    """What a folder says it is, None if it is no kept version, or is just being removed."""
    try:
        return msgspec.json.decode((path / _LABEL).read_bytes(), type=Kept)
    except FileNotFoundError:
        return None


def hold(root: Path, kept: Kept, folder: Path) -> bool:
    """Takes hold of a kept version in a new `folder`, as the learner may remove it from `root`; whether all
    of it was there."""
    folder.mkdir(parents=True)
    try:
        for path in (root / str(kept.version)).iterdir():
            _link(path, folder / path.name)
    except FileNotFoundError:
        return False
    return read_kept(folder) == kept


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def forget_versions(folder: Path) -> None:
    """Removes what an earlier run of this name kept in its folder, with its evaluations."""
    shutil.rmtree(folder / KEPT, ignore_errors=True)
    (folder / EVALUATIONS).unlink(missing_ok=True)


class KeptVersions:
    """The thread that writes, and what it removes.

    Worked example, `keep` 2 and `every` 10: after version 13 there are 0, 10, 12 and 13; after 21 there are
    0, 20 and 21. Version 0 stays because a replay starts from it, 10 until 20 is there because
    an evaluation is to have it. With `keep` 0 only versions that an evaluation is to have are written.
    Lifecycle: `put` for each version, then the end of the block, which first writes what waits.
    """

    def __init__(
        self,
        root: Path,
        model: Path,
        *,
        keep: int | Literal["all"],
        every: int,
        lineage: Callable[[], int],
    ) -> None:
        """`root`: `weights/`. `model`: where config and tokenizer are copied from. `every`: the newest
        multiple of it stays, 0: none has to. `lineage`: that of now, which a fork changes."""
        self._root, self._model, self._keep, self._every = root, model, keep, every
        self._lineage = lineage
        self._waiting: list[tuple[Kept, Mapping[str, torch.Tensor]]] = []
        self._forks: list[tuple[int, int]] = []
        """(lineage, the version it began with): later versions of older lineages were undone."""
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="kept-versions", daemon=True)
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".*"):
            shutil.rmtree(left)
        self._thread.start()

    def put(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps a committed version. Returns at once; the tensors must not change afterwards."""
        kept = Kept(manifest.version, manifest.digest, self._lineage())
        if self._keep == 0 and not self._due(kept.version):
            return
        with self._changed:
            if not self._forks or self._forks[-1][0] != kept.lineage:
                self._forks.append((kept.lineage, kept.version))
            due = [job for job in self._waiting if self._due(job[0].version)]
            self._waiting = [*([] if self._due(kept.version) else due[-1:]), (kept, tensors)]
            self._changed.notify()

    def _due(self, version: int) -> bool:
        return self._every > 0 and version % self._every == 0

    def _run(self) -> None:
        from safetensors import SafetensorError

        while (job := self._next()) is not None:
            kept, tensors = job
            try:
                self._undo()
                if read_kept(self._root / str(kept.version)) != kept:
                    self._write(kept, tensors)
                self._prune()
            except (OSError, SafetensorError) as error:
                log.error("version %d is not kept in %s: %s", kept.version, self._root, error)

    def _next(self) -> tuple[Kept, Mapping[str, torch.Tensor]] | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return self._waiting.pop(0) if self._waiting else None

    def _write(self, kept: Kept, tensors: Mapping[str, torch.Tensor]) -> None:
        folder, part = self._root / str(kept.version), self._root / f".{kept.version}.part"
        before = read_kept(folder)
        if folder.exists() and (before is None or before.digest == kept.digest):
            _label(folder, kept)  # the warm-up's version 0, or a version that a fork went back to
            return
        from learner.convert.hf import save_hf
        from learner.model.hf_config import read_shape

        try:
            save_hf(dict(tensors), read_shape(self._model), part, self._model)
            _label(part, kept)
            for path in part.iterdir():
                sync(path)
            self._remove(kept.version)
            part.rename(folder)
            sync(self._root)
        finally:  # a full disk gets its space back
            shutil.rmtree(part, ignore_errors=True)

    def _undo(self) -> None:
        """Removes versions that a fork undid."""
        for version, kept in kept_versions(self._root).items():
            if any(kept.lineage < lineage and version > at for lineage, at in self._forks):
                self._remove(version)

    def _prune(self) -> None:
        if self._keep == "all":
            return
        found = [version for version in kept_versions(self._root) if version]  # 0 always stays
        due = [version for version in found if self._due(version)]
        stays = {*found[max(0, len(found) - self._keep) :], *due[-1:]}
        for version in found:
            if version not in stays:
                self._remove(version)

    def _remove(self, version: int) -> None:
        """Removes a version; who looks meanwhile sees all of it or nothing."""
        folder, old = self._root / str(version), self._root / f".{version}.old"
        if folder.exists():
            folder.rename(old)
            shutil.rmtree(old)

    def __enter__(self) -> KeptVersions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()


def _label(folder: Path, kept: Kept) -> None:
    """Writes `version.json` in one piece."""
    part = folder / f"{_LABEL}.part"
    part.write_bytes(msgspec.json.encode(kept) + b"\n")
    sync(part)
    part.rename(folder / _LABEL)
