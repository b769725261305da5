"""Kept versions: which stay, what a fork undoes, and what a crash or a slow disk leaves."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from launch.tiny_model import make_tiny
from learner import kept
from learner.convert.hf import HfFolder
from learner.kept import Kept, KeptVersions, forget_versions, kept_versions
from tests.waiting import wait_until
from weightsync.manifest import Manifest

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("kept") / "model", seed=0)


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    stored = HfFolder(model)
    return {name: stored.tensor(name) for name in stored.shapes}


def version(number: int, tensors: Tensors, shift: float = 0.0) -> tuple[Manifest, Tensors]:
    """A version whose weights depend on its number and on `shift`."""
    made = {name: tensor + number + shift for name, tensor in tensors.items()}
    return Manifest.of(number, made), made


class Run:
    """A run that keeps versions in `root`."""

    def __init__(self, root: Path, model: Path, tensors: Tensors) -> None:
        self.root, self.lineage = root, 0
        self._model, self._tensors = model, tensors

    def keeping(self, keep: int | Literal["all"] = "all", every: int = 0) -> KeptVersions:
        return KeptVersions(self.root, self._model, keep=keep, every=every, lineage=lambda: self.lineage)

    def put(
        self, *numbers: int, keep: int | Literal["all"] = "all", every: int = 0, shift: float = 0.0
    ) -> None:
        """Puts versions, and waits for each to be written."""
        for number in numbers:
            with self.keeping(keep, every) as writer:
                writer.put(*version(number, self._tensors, shift))

    def names(self) -> list[str]:
        return sorted((path.name for path in self.root.iterdir()), key=lambda name: (len(name), name))


@pytest.fixture
def run(tmp_path: Path, model: Path, tensors: Tensors) -> Run:
    return Run(tmp_path / "weights", model, tensors)


def test_the_newest_and_those_that_are_due_stay(run: Run) -> None:
    run.put(*range(14), keep=2, every=10)
    assert run.names() == ["0", "10", "12", "13"]
    run.put(*range(14, 22), keep=2, every=10)
    assert run.names() == ["0", "20", "21"]


def test_four_newest_stay_from_the_first_on(run: Run) -> None:
    for newest in range(7):
        run.put(newest, keep=4)
        assert run.names() == ["0", *(str(number) for number in range(max(1, newest - 3), newest + 1))]


def test_with_keep_0_only_what_is_due_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = spy(monkeypatch)
    run.put(*range(10), keep=0, every=4)
    assert written == [0, 4, 8]
    assert run.names() == ["0", "8"]


def test_a_kept_version_is_a_whole_folder_of_those_weights(run: Run, model: Path, tensors: Tensors) -> None:
    run.put(3)
    folder, (manifest, made) = run.root / "3", version(3, tensors)
    assert kept_versions(run.root) == {3: Kept(3, manifest.digest, 0)}
    found = load_file(folder / "model.safetensors")
    assert found.keys() == made.keys()
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in made.items())
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_fork_removes_what_it_undid(run: Run, tensors: Tensors) -> None:
    run.put(*range(4))
    before = (run.root / "3" / "model.safetensors").stat().st_ino
    with run.keeping() as writer:
        for number in (4, 5):
            writer.put(*version(number, tensors))
            wait_until(lambda number=number: str(number) in run.names(), 30, "the version")
        run.lineage = 1
        writer.put(*version(3, tensors))
        wait_until(lambda: kept_versions(run.root)[3].lineage == 1, 30, "the label")
        assert run.names() == ["0", "1", "2", "3"]
        writer.put(*version(4, tensors, 0.5))
    assert [one.lineage for one in kept_versions(run.root).values()] == [0, 0, 0, 1, 1]
    assert (run.root / "3" / "model.safetensors").stat().st_ino == before


def test_a_version_of_other_weights_takes_the_place_of_the_old_one(run: Run, tensors: Tensors) -> None:
    run.put(1)
    run.put(1, shift=0.5)
    manifest, made = version(1, tensors, 0.5)
    assert kept_versions(run.root)[1].digest == manifest.digest
    name = next(iter(made))
    assert np.array_equal(load_file(run.root / "1" / "model.safetensors")[name], made[name].numpy())


def test_a_run_that_goes_on_rewrites_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.put(1, 2, 3)
    written = spy(monkeypatch)
    run.put(2, 3, 4)
    assert written == [4]
    assert run.names() == ["1", "2", "3", "4"]


def test_the_warm_ups_version_0_is_only_labelled(run: Run) -> None:
    make_tiny("qwen3", run.root / "0", seed=5)
    before = (run.root / "0" / "model.safetensors").read_bytes()
    run.put(0)
    assert (run.root / "0" / "model.safetensors").read_bytes() == before
    assert kept_versions(run.root)[0].version == 0


def test_a_disk_that_fails_costs_the_version_and_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(kept, "sync", full)
        run.put(1)
    assert run.names() == []
    assert "version 1 is not kept" in caplog.text
    run.put(2)
    assert run.names() == ["2"]


def test_what_a_crash_left_is_removed_at_the_next_start(run: Run) -> None:
    for name in (".7.part", ".6.old"):
        (run.root / name).mkdir(parents=True)
        (run.root / name / "model.safetensors").write_bytes(b"half")
    with run.keeping():
        assert run.names() == []


def test_a_slow_disk_loses_versions_but_not_the_newest_or_what_is_due(
    run: Run, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go_on.wait(30)

    written = spy(monkeypatch, slow)
    with run.keeping(2, every=5) as writer:
        writer.put(*version(8, tensors))
        assert begun.wait(30)
        for number in (9, 10, 11, 12):
            writer.put(*version(number, tensors))
        go_on.set()
    assert written == [8, 10, 12]


def test_a_new_run_forgets_the_last_ones(run: Run) -> None:
    run.put(1)
    (run.root.parent / kept.EVALUATIONS).write_text("{}\n")
    forget_versions(run.root.parent)
    assert list(run.root.parent.iterdir()) == []


def spy(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> list[int]:
    """Versions that are written; `before` is called at each."""
    seen: list[int] = []
    write = KeptVersions._write

    def spied(self: KeptVersions, one: Kept, tensors: Tensors) -> None:
        seen.append(one.version)
        before()
        write(self, one, tensors)

    monkeypatch.setattr(KeptVersions, "_write", spied)
    return seen
